"""``checksums.json``: size and CRC-32 of every file of a checkpoint.

OLMo-core writes a checkpoint beside its place and moves it there. After that this file is added, last of all, so that a
checkpoint without it was cut short, and one whose files disagree with it was damaged.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from olmo_core.train.checkpoint import Checkpointer

from moda.errors import UserError
from moda.files import read_json, write_json

from .trust import check_path

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 24


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _crc32_of_all(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_crc32, paths))


def write_checksums(folder: Path) -> None:
    """Write size and CRC-32 of every file of a checkpoint; the file appears whole or not at all."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    table = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "crc32": crc}
        for p, crc in zip(files, _crc32_of_all(files))
    }
    write_json(folder / CHECKSUMS, table)


def damage(folder: Path) -> str | None:
    """What is wrong with a run's checkpoint, or None if it is whole."""
    if not Checkpointer.dir_is_checkpoint(str(folder)) or not (folder / CHECKSUMS).is_file():
        return "it was cut short while being written"
    return differences(folder)


def differences(folder: Path, below: str = "") -> str | None:
    """How the files of a folder differ from its ``checksums.json``, or None if they agree.

    :param below: only what begins with this.
    """
    try:
        table: dict[str, Any] = read_json(folder / CHECKSUMS, "checkpoint")
        entries = [(name, int(e["bytes"]), str(e["crc32"])) for name, e in table.items() if name.startswith(below)]
        present = {name: (path := check_path(folder, name)).is_file() and path.stat().st_size for name, _, _ in entries}
    except (UserError, KeyError, OSError, OverflowError, TypeError, ValueError):
        entries = []
    if not entries:
        return f"{CHECKSUMS} is damaged"
    for name, size, _ in entries:
        if present[name] is False:
            return f"{name} is missing"
        if present[name] != size:
            return f"{name} has {present[name]} bytes instead of {size}"
    for (name, _, expected), actual in zip(entries, _crc32_of_all([folder / name for name, _, _ in entries])):
        if actual != expected:
            return f"the contents of {name} have changed since it was saved"
    return None
