"""Token files held against their manifest and tokenizer before a run, fast enough for ten thousand of them."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.data import NumpyDatasetDType
from olmo_core.io import is_url

from moda.config.schema import Verify
from moda.errors import UserError

from .manifest import find_manifest, read_manifest, shard_entry, verify_hashes
from .tokenizer import Tokenizer

__all__ = ["check_token_files", "missing_shards", "token_dtype"]

log = logging.getLogger(__name__)

_CHECKED_TOKENS = 1 << 14  # token ids read from either end of a file when it is checked
_THREADS = 16


def token_dtype(vocab_size: int) -> NumpyDatasetDType:
    """The integer type of token files: uint16 where every id fits, uint32 otherwise."""
    return NumpyDatasetDType.uint16 if vocab_size <= 2**16 else NumpyDatasetDType.uint32


class _Cache:
    """Files that were found in order, with the size and time they had then: unchanged ones are not opened again.

    :param folder: where it is kept; None for no cache.
    """

    def __init__(self, folder: str | Path | None, tokenizer: Tokenizer) -> None:
        name = f"checked-{tokenizer.fingerprint.replace(':', '-').replace('/', '-')[:40]}.json"
        self.path = None if folder is None else Path(folder) / name
        self.entries: dict[str, list[Any]] = {}
        if self.path is not None and self.path.is_file():
            try:
                self.entries = json.loads(self.path.read_text())
            except (OSError, json.JSONDecodeError, UnicodeDecodeError):
                log.warning("%s cannot be read; the token files are checked again", self.path)
        self._changed = False

    def add(self, path: str, stamp: list[Any]) -> None:
        self.entries[path] = stamp
        self._changed = True

    def save(self) -> None:
        if self.path is None or not self._changed:
            return
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self.entries))
            scratch.replace(self.path)
        except OSError as e:  # a read-only folder costs time, nothing else
            log.warning("%s cannot be written (%s): token files will be checked again next time", self.path, e)


class _Manifests:
    """The manifest of every folder that token files lie in, looked for once."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[Path, int] | None] = {}

    def of(self, path: Path) -> tuple[Path, int] | None:
        """(file, time of its last change), or None."""
        if path.parent not in self._found:
            file = find_manifest(path)
            self._found[path.parent] = None if file is None else (file, file.stat().st_mtime_ns)
        return self._found[path.parent]


def missing_shards(pattern: str) -> list[str]:
    """Shards that a manifest lists, a glob covers, and the disk lacks."""
    folder = Path(pattern).expanduser().parent
    file = find_manifest(folder / "any") if folder.is_dir() else None
    if file is None:
        return []
    names = [file.parent / name for name in read_manifest(file).get("shards", {})]
    wanted = [p for p in names if p.parent == folder and fnmatch(p.name, Path(pattern).name)]
    return [str(p) for p in wanted if not p.is_file()]


def _check_made_with(name: str, file: Path, tokenizer: Tokenizer) -> None:
    made_with = read_manifest(file).get("tokenizer", {})
    theirs = made_with.get("fingerprint")
    if theirs is not None and theirs != tokenizer.fingerprint:
        raise UserError(
            "data.tokenizer",
            f"the tokenizer that made {name}: {made_with.get('name')} ({theirs[:20]}, {file})",
            f"{tokenizer.name} ({tokenizer.fingerprint[:20]})",
        )


def _check_ids(name: str, size: int, dtype: np.dtype, tokenizer: Tokenizer) -> None:
    """Ids at both ends of a file must be within the vocabulary."""
    count = min(_CHECKED_TOKENS, size // dtype.itemsize)
    for offset in {0, size - count * dtype.itemsize}:
        largest = int(np.fromfile(name, dtype=dtype, count=count, offset=offset).max())
        if largest >= tokenizer.config.vocab_size:
            raise UserError(
                "data.tokenizer",
                f"a tokenizer whose vocabulary has the token ids of {name} (up to {largest})",
                f"{tokenizer.name} with {tokenizer.config.vocab_size} tokens",
            )


def check_token_files(
    key: str,
    paths: list[str],
    tokenizer: Tokenizer,
    *,
    verify: Verify = Verify.size,
    cache: str | Path | None = None,
) -> int:
    """Check local token files and return how many tokens they hold. Remote ones are passed over.

    A manifest beside them must name the same tokenizer and, where it lists them, the sizes (or hashes) that they have. Ids at
    both ends of each file must be within the vocabulary.

    :param verify: ``hash`` reads every file whole and compares its SHA-256.
    :param cache: a folder in which to remember unchanged files that were in order.

    :raises UserError: naming the first file that is wrong, and what is wrong with it.
    """
    dtype = np.dtype(token_dtype(tokenizer.config.vocab_size).as_np_dtype())
    known, manifests = _Cache(cache, tokenizer), _Manifests()
    checked: dict[Path, bool] = {}  # manifests whose tokenizer was compared
    to_hash: list[tuple[Path, dict[str, Any]]] = []
    fresh: list[tuple[str, list[Any]]] = []
    total = 0
    for name in paths:
        if is_url(name):
            continue
        path = Path(name)
        try:
            stat = path.stat()
        except OSError:
            raise UserError(key, "token files that exist", name) from None
        total += stat.st_size // dtype.itemsize
        found = manifests.of(path)
        stamp = [stat.st_size, stat.st_mtime_ns, None if found is None else found[1]]
        before = known.entries.get(name)
        if before is not None and before[:3] == stamp and (verify == Verify.size or before[3]):
            continue
        entry = None
        if found is not None:
            if found[0] not in checked:
                _check_made_with(name, found[0], tokenizer)
                checked[found[0]] = True
            entry = shard_entry(found[0], path)
            if entry is not None and entry["bytes"] != stat.st_size:
                hint = "it was cut short or written over since it was prepared"
                raise UserError(
                    key, f"{name} with the {entry['bytes']} bytes of {found[0]}", f"{stat.st_size} bytes", hint
                )
        if stat.st_size == 0 or stat.st_size % dtype.itemsize:
            expected = f"{name} to hold whole {dtype} token ids"
            raise UserError(key, expected, f"{stat.st_size} bytes", "truncated, or another type?")
        if verify == Verify.hash and entry is not None:
            to_hash.append((path, entry))
        fresh.append((name, [*stamp, verify == Verify.hash and entry is not None]))
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda item: _check_ids(item[0], item[1][0], dtype, tokenizer), fresh):
            pass
    if to_hash:
        log.info("reading %d token files to compare their hashes ...", len(to_hash))
        verify_hashes(key, to_hash)
    if verify == Verify.hash and len(to_hash) < len(fresh):
        log.warning("%s: %d files have no hash in a manifest to compare with", key, len(fresh) - len(to_hash))
    for name, stamp in fresh:
        known.add(name, stamp)
    known.save()
    return total
