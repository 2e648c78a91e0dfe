"""The manifest beside prepared token files: finding it, reading it, and comparing files with it."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from moda.errors import UserError
from moda.files import read_json

MANIFEST = "manifest.json"


@lru_cache(maxsize=64)
def _read(path: str, stamp: tuple[int, int]) -> dict[str, Any]:
    data = read_json(Path(path), "manifest")
    for name in ("tokenizer", "shards"):
        if not isinstance(data.setdefault(name, {}), dict):
            raise UserError("manifest", f"an object {name!r} in {path}", type(data[name]).__name__)
    for name, entry in data["shards"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            raise UserError("manifest", f"the size of shard {name} in {path}")
    return data


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest's contents, with ``tokenizer`` and ``shards``, read once while the file is unchanged.

    :raises UserError: if it is damaged.
    """
    stat = path.stat()
    return _read(str(path), (stat.st_size, stat.st_mtime_ns))


def find_manifest(token_file: Path) -> Path | None:
    """The manifest that describes a token file: in its folder or the one above."""
    for folder in (token_file.parent, token_file.parent.parent):
        if (folder / MANIFEST).is_file():
            return folder / MANIFEST
    return None


def shard_entry(manifest: Path, token_file: Path) -> dict[str, Any] | None:
    """What a manifest says of one token file (``bytes``, ``sha256``, ...), or None."""
    name = Path(os.path.relpath(token_file, manifest.parent)).as_posix()
    return read_manifest(manifest)["shards"].get(name)


def hash_of(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
