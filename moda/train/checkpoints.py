"""Which checkpoint a run resumes from: the newest one that is whole.

OLMo-core writes a checkpoint beside its place and moves it there. After that this module adds ``checksums.json``, last of all,
so that a checkpoint without it was cut short, and one whose files disagree with it was damaged.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from olmo_core.distributed.utils import barrier, get_fs_local_rank, get_rank
from olmo_core.io import is_url
from olmo_core.train.callbacks import Callback
from olmo_core.train.checkpoint import Checkpointer

from moda.config.schema import ModelConfig
from moda.errors import UserError
from moda.typed import from_dict, to_dict

__all__ = [
    "ChecksumCallback",
    "changed_settings",
    "check_same_model",
    "damage",
    "find_resumable",
    "read_settings",
    "write_checksums",
]

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
CONFIG = "config.json"
_BLOCK = 1 << 24


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def write_checksums(folder: Path) -> None:
    """Write size and CRC-32 of every file of a checkpoint; the file appears whole or not at all."""
    files = _files(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_crc32, files))
    table = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "crc32": s} for p, s in zip(files, sums)}
    scratch = folder / f".{CHECKSUMS}.partial"
    with scratch.open("w") as f:
        json.dump(table, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    scratch.replace(folder / CHECKSUMS)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    if not Checkpointer.dir_is_checkpoint(str(folder)):
        return "it was cut short while being written"
    try:
        table: dict[str, dict[str, Any]] = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return "it was cut short while being written"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{CHECKSUMS} is damaged"
    present = [(name, entry, folder / name) for name, entry in table.items()]
    for name, entry, path in present:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, entry, _), found in zip(present, pool.map(_crc32, [p for _, _, p in present])):
            if found != entry["crc32"]:
                return f"the contents of {name} have changed since it was saved"
    return None


def find_resumable(save_folder: str) -> Path | None:
    """The newest whole checkpoint of a run; damaged and unfinished ones are passed over with a warning that names them."""
    steps: list[tuple[int, Path]] = []
    if is_url(save_folder) or not Path(save_folder).is_dir():
        return None
    for path in Path(save_folder).iterdir():
        if path.is_dir() and (match := re.fullmatch(r"step(\d+)", path.name)):
            steps.append((int(match.group(1)), path))
    for _, path in sorted(steps, reverse=True):
        reason = damage(path)
        if reason is None:
            return path
        log.warning("checkpoint %s cannot be used: %s; looking for the one before it", path, reason)
    return None


def read_settings(folder: Path) -> dict[str, Any]:
    """The resolved configuration saved with a checkpoint, as plain sections.

    :raises UserError: where the folder has none.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise UserError("checkpoint", f"a checkpoint of this project, with {CONFIG}", str(folder))
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError("checkpoint", f"a readable {file}", hint=str(e)) from None
    if not isinstance(settings, dict) or "model" not in settings:
        raise UserError("checkpoint", f"{file} to have a model section", "none")
    return settings


def check_same_model(folder: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint of another model before anything of it is loaded.

    :raises UserError: naming the first setting that differs.
    """
    saved = to_dict(from_dict(ModelConfig, read_settings(folder)["model"], "model"))
    for key, theirs, ours in _differences(saved, to_dict(model), "model"):
        if key != "model.attention_backend":  # changes speed, not the model
            raise UserError(key, f"{theirs!r}, as in checkpoint {folder}", ours, "or choose another train.save_folder")


def _differences(a: Any, b: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ in two plain configurations, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b}):
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b


def changed_settings(folder: Path, config: Any) -> list[str]:
    """What a run that resumes from ``folder`` has set otherwise than when the checkpoint was saved, as ``key: was -> is``."""
    told = _differences(read_settings(folder), to_dict(config), "")
    return [f"{key}: {was} -> {now}" for key, was, now in told if key not in ("train.save_folder", "description")]


class ChecksumCallback(Callback):
    """Seals every checkpoint with its checksums once OLMo-core and the config saver have written it."""

    priority: ClassVar[int] = -100

    def post_checkpoint_saved(self, path: Any) -> None:
        if is_url(str(path)):
            return
        if not self.trainer.callbacks["checkpointer"].save_async:  # type: ignore[attr-defined]
            barrier()  # every rank's file is in place; asynchronous saves get here from rank 0's last write
        if get_rank() == 0 and get_fs_local_rank() == 0:
            write_checksums(Path(str(path)))
