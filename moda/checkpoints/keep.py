"""``checkpoint.keep``: which checkpoints of a run go when a newer one is whole.

Only whole checkpoints that the run itself saved in its folder are counted and removed: their ``config.json`` names this folder as
``train.save_folder``. What was copied or renamed into it, and what is damaged, stays.
"""

import contextlib
import logging
import shutil
from pathlib import Path

from olmo_core.train.checkpoint import Checkpointer

from moda.errors import UserError
from moda.files import read_json

from .find import CONFIG, steps_of
from .seal import CHECKSUMS

log = logging.getLogger(__name__)


def _saved_here(path: Path) -> bool:
    if not Checkpointer.dir_is_checkpoint(str(path)) or not (path / CHECKSUMS).is_file():
        return False
    try:
        saved = read_json(path / CONFIG, "checkpoint")["train"]["save_folder"]
        return Path(saved).resolve() == path.parent.resolve()
    except (KeyError, OSError, RuntimeError, TypeError, UserError, ValueError):
        return False


def checkpoints_of_run(folder: Path, step: int) -> list[Path]:
    """What a run has saved in its folder up to the step that it resumes from, the oldest first."""
    return [path for path in reversed(steps_of(folder)) if int(path.name[4:]) <= step and _saved_here(path)]


def _is_ephemeral(path: Path) -> bool:
    with contextlib.suppress(UserError):  # damaged or gone since: as good as permanent
        return read_json(path / Checkpointer.METADATA_FNAME, "checkpoint").get("ephemeral") is True
    return False


def remove_old(saved: list[Path], keep: int | None) -> list[Path]:
    """Remove those before the newest, which is whole, that are ephemeral or of which there are too many.

    :param saved: the run's checkpoints, the oldest first.
    :param keep: permanent ones to keep; None for all.

    :returns: those that are left.
    """
    saved = [path for path in saved if path.is_dir()]  # someone may have removed one
    permanent = [path for path in saved if not _is_ephemeral(path)]
    stay = {saved[-1], *(permanent if keep is None else permanent[-keep:])}
    for path in saved:
        if path not in stay:
            log.info("removing checkpoint %s", path)
            try:
                path.rename(path.with_name(f".{path.name}.removed"))  # so that none is ever half there
            except OSError as e:  # no reason to stop
                log.warning("checkpoint %s cannot be removed: %s", path, e)
    for removed in saved[-1].parent.glob(".step*.removed"):
        shutil.rmtree(removed, ignore_errors=True)
    return [path for path in saved if path in stay]
