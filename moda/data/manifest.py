"""The manifest beside prepared token files: finding it, reading it, and holding the files against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from moda.errors import UserError

__all__ = ["MANIFEST", "find_manifest", "read_manifest", "sha256_of", "shard_entry", "verify_hashes"]

MANIFEST = "manifest.json"
_BLOCK = 1 << 24


@lru_cache(maxsize=64)
def _read(path: str, stamp: tuple[int, int]) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(path, "a readable manifest", hint=str(e)) from None
    if not isinstance(found, dict):
        raise UserError(path, "a manifest (a JSON object)", type(found).__name__)
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest's contents, read once while the file is unchanged.

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
    shards = read_manifest(manifest).get("shards", {})
    return shards.get(token_file.resolve().relative_to(manifest.parent.resolve()).as_posix())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def verify_hashes(key: str, files: Iterable[tuple[Path, dict[str, Any]]], threads: int = 8) -> None:
    """Read files whole and compare them with their entries.

    :raises UserError: naming the first file whose contents have changed.
    """
    pairs: list[tuple[Path, dict[str, Any]]] = list(files)
    with ThreadPoolExecutor(threads) as pool:
        for (path, entry), found in zip(pairs, pool.map(sha256_of, [p for p, _ in pairs])):
            if found != entry["sha256"]:
                expected = f"{path} as it was prepared (sha256 {entry['sha256'][:16]}...)"
                raise UserError(
                    key, expected, f"{found[:16]}...", "the file has changed or was damaged: prepare it again"
                )
