"""Which folders are checkpoints, of what kind, and which one a run resumes from."""

import logging
import re
from pathlib import Path
from typing import Literal

from olmo_core.io import is_url

from moda.errors import UserError
from moda.files import read_json

from .seal import CHECKSUMS, damage

log = logging.getLogger(__name__)

CONFIG = "config.json"
STATE = "model_and_optim"
Kind = Literal["moda", "olmo-core", "huggingface", "export"]


def steps_of(folder: Path) -> list[Path]:
    """The folders ``stepN`` of a run, the newest first."""
    steps = [(int(m[1]), p) for p in folder.glob("step*") if p.is_dir() and (m := re.fullmatch(r"step(\d+)", p.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def find_resumable(save_folder: str) -> Path | None:
    """The newest whole checkpoint of a run. Damaged and unfinished ones are passed over with a warning that names them.

    :returns: None where no checkpoint was ever finished: the run begins anew.

    :raises UserError: where there were checkpoints and none of them is whole any more; a new run would replace them.
    """
    if is_url(save_folder):
        return None
    steps = steps_of(Path(save_folder))
    for path in steps:
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s cannot be used: %s; looking for the one before it", path, reason)
    finished = [path.name for path in steps if (path / CHECKSUMS).exists()]
    if finished:
        raise UserError(
            "train.save_folder", f"a whole checkpoint in {save_folder}", f"damaged ones only: {', '.join(finished)}",
            "copy one there again, or move them away to begin anew",
        )  # fmt: skip
    return None


def choose_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint or export as it is; of a run's folder its newest whole checkpoint, which is logged.

    :raises UserError: for a run whose checkpoints are all damaged.
    """
    folder = Path(path).expanduser()
    if (folder / CONFIG).is_file() or not steps_of(folder):
        return folder
    try:
        newest = find_resumable(str(folder))
    except UserError as e:
        raise UserError("checkpoint", e.expected, e.got) from None
    if newest is None:
        return folder  # kind_of says what is there
    log.info("%s: %s is its newest whole checkpoint", folder, newest.name)
    return newest


def kind_of(folder: Path) -> Kind:
    """What a folder is a checkpoint of: ``moda`` (a run of this project), ``olmo-core`` (a run of OLMo-core's own scripts),
    ``export`` (a Hugging Face folder written by this project) or ``huggingface`` (any other).

    :raises UserError: for a folder that is none of these, or whose ``config.json`` cannot be read.
    """
    if not folder.is_dir():
        raise UserError("checkpoint", "an existing checkpoint folder (stepN)", str(folder))
    if (folder / CONFIG).is_file():
        settings = read_json(folder / CONFIG, "checkpoint")
        if (folder / STATE).is_dir():
            model = settings.get("model")
            if not isinstance(model, dict):
                raise UserError("checkpoint", f"a readable {folder / CONFIG} with a model", type(model).__name__)
            return "olmo-core" if "block" in model or "_CLASS_" in model else "moda"
        if settings.get("model_type") == "moda" and not isinstance(settings.get("model"), dict):
            old = "exported before version 0.1.0: export the checkpoint again"
            raise UserError("checkpoint", f"a model section in {folder / CONFIG}", "none", old)
        if "model_type" in settings:
            return "export" if settings["model_type"] == "moda" else "huggingface"
    steps = [p.name for p in steps_of(folder)[:3]]
    hint = f"it has {', '.join(reversed(steps))}" if steps else None
    raise UserError("checkpoint", f"a folder with {CONFIG} and {STATE}/", str(folder), hint)
