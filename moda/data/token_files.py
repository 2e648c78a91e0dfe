"""Token files: their integer type, and a check of many of them against their manifest and tokenizer before a run."""

import logging
import string
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.io import is_url

from moda.config.schema import Verify
from moda.errors import UserError
from moda.files import read_json, write_json

from .manifest import find_manifest, hash_of, read_manifest, shard_entry
from .text import expand
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SAMPLE = 1 << 14  # token ids at either end of a file that are always looked at
_READ_WHOLE = 4 << 30  # bytes of files, taken together, whose ids are all looked at
_BLOCK = 1 << 24
_THREADS = 16
_MAGIC = {
    b"\x93NUMPY": "an array written by np.save: write the bare ids with tofile",
    b"PK\x03\x04": "a zip archive, as np.savez and torch.save write",
    b"PAR1": "a parquet file",
}


def token_dtype(vocab_size: int) -> np.dtype:
    """The integer type of token files: uint16 where every id fits, uint32 otherwise."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def looks_like(head: bytes, dtype: np.dtype) -> str | None:
    """What a file is that holds no flat ids of this type, as far as its first bytes tell, or None.

    Wider integers (and floats) of small numbers leave every second word zero, or three of four.
    """
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    if len(head) >= 64 and not head.translate(None, string.printable.encode()):
        return "text: give it as data.text, or prepare it"
    words = np.frombuffer(head[: len(head) // (4 * dtype.itemsize) * 4 * dtype.itemsize], dtype)
    if len(words) < 16 or not words.any():
        return None
    used = int(words.reshape(-1, 4).any(axis=0).sum())
    if used == 1 or not words[0::2].any() or not words[1::2].any():
        width = dtype.itemsize * (4 if used == 1 else 2)
        return f"{width}-byte numbers (int{8 * width}) of small ids: convert them to {dtype}"
    return None


def find_token_files(key: str, patterns: list[str]) -> list[str]:
    """Token files of paths and globs; URLs are taken as they are.

    :raises UserError: where nothing matches, or a shard that a manifest lists is missing.
    """
    paths: list[str] = []
    for pattern in patterns:
        if is_url(pattern):
            paths.append(pattern)
            continue
        matches = [p for p in expand(pattern) if Path(p).is_file()]
        if not matches:
            raise UserError(key, "token files that exist", pattern, "scripts/prepare_data.py makes them from text")
        folder = Path(pattern).expanduser().parent
        manifest = find_manifest(folder / "any") if folder.is_dir() else None
        names = [] if manifest is None else [manifest.parent / name for name in read_manifest(manifest)["shards"]]
        for shard in names:
            if shard.parent == folder and fnmatch(shard.name, Path(pattern).name) and not shard.is_file():
                raise UserError(key, f"all shards that the manifest lists under {pattern}", f"no {shard}")
        paths += matches
    return paths


def _check_made_with(name: str, manifest: Path, tokenizer: Tokenizer) -> None:
    made_with = read_manifest(manifest)["tokenizer"]
    fingerprint = str(made_with.get("fingerprint", tokenizer.fingerprint))
    if fingerprint != tokenizer.fingerprint:
        expected = f"the tokenizer that made {name}: {made_with.get('name')} ({fingerprint[:20]}, {manifest})"
        raise UserError("data.tokenizer", expected, f"{tokenizer.name} ({tokenizer.fingerprint[:20]})")


def _check_ids(key: str, name: str, dtype: np.dtype, tokenizer: Tokenizer, whole: bool) -> None:
    """The ids of a file, or those at both of its ends, must be flat and within the vocabulary."""
    size, length = Path(name).stat().st_size // dtype.itemsize, _BLOCK if whole else _SAMPLE
    largest = 0
    for start in range(0, size, length) if whole else sorted({0, max(size - length, 0)}):
        ids = np.fromfile(name, dtype=dtype, count=length, offset=start * dtype.itemsize)
        if start == 0 and (what := looks_like(ids[:_SAMPLE].tobytes(), dtype)):
            raise UserError(key, f"{name} to hold flat {dtype} token ids", f"what looks like {what}")
        largest = max(largest, int(ids.max()))
    if largest >= tokenizer.config.vocab_size:
        expected = f"a tokenizer whose vocabulary has the token ids of {name} (up to {largest})"
        raise UserError("data.tokenizer", expected, f"{tokenizer.name} with {tokenizer.config.vocab_size} tokens")


def check_documents(key: str, paths: list[str], tokenizer: Tokenizer) -> None:
    """Check that local token files hold documents, which end with eos. Remote ones are passed over.

    :raises UserError: naming the first file without any.
    """
    dtype, eos = token_dtype(tokenizer.config.vocab_size), tokenizer.config.eos_token_id
    for path in paths:
        if not is_url(path):
            ids = np.memmap(path, dtype=dtype, mode="r")
            if not any((ids[at : at + 2**20] == eos).any() for at in range(0, len(ids), 2**20)):
                raise UserError(key, f"documents that end with token {eos} ({tokenizer.name}'s eos)", f"none in {path}")


def check_token_files(
    key: str, paths: list[str], tokenizer: Tokenizer, *, verify: Verify = Verify.size, cache: str | Path | None = None
) -> int:
    """Check local token files and return how many tokens they hold. Remote ones are passed over.

    A manifest beside them must name the same tokenizer and, where it lists them, the sizes (or hashes) that they have. Ids
    must be within the vocabulary: all of them where the files are together no larger than 4 GiB, else at both ends of each.

    :param verify: ``hash`` reads every file whole: its SHA-256 and all ids are checked.
    :param cache: a folder in which to remember unchanged files that were in order.

    :raises UserError: naming the first file that is wrong, and what is wrong with it.
    """
    dtype = token_dtype(tokenizer.config.vocab_size)
    name = f"checked-{tokenizer.fingerprint.replace(':', '-').replace('/', '-')[:40]}.json"
    cache_file = None if cache is None else Path(cache) / name
    known: dict[str, Any] = {}  # files that were in order, with the size and time they had then
    if cache_file is not None and cache_file.is_file():
        try:
            known = read_json(cache_file, "data.work_dir")
        except UserError as e:
            log.warning("%s; the token files are checked again", e)
    manifests: dict[Path, Path | None] = {}  # of each folder
    to_hash: list[tuple[Path, str]] = []
    fresh: dict[str, list[Any]] = {}
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
        if path.parent not in manifests:
            manifests[path.parent] = manifest = find_manifest(path)
            if manifest is not None:
                _check_made_with(name, manifest, tokenizer)
        manifest = manifests[path.parent]
        stamp = [stat.st_size, stat.st_mtime_ns, None if manifest is None else manifest.stat().st_mtime_ns]
        before = known.get(name)
        if before is not None and before[:3] == stamp and (verify == Verify.size or before[3]):
            continue
        entry = None if manifest is None else shard_entry(manifest, path)
        if entry is not None and entry["bytes"] != stat.st_size:
            expected = f"{name} with the {entry['bytes']} bytes of {manifest}"
            hint = "it was cut short or written over since it was prepared"
            raise UserError(key, expected, f"{stat.st_size} bytes", hint)
        if stat.st_size == 0 or stat.st_size % dtype.itemsize:
            expected = f"{name} to hold whole {dtype} token ids"
            raise UserError(key, expected, f"{stat.st_size} bytes", "truncated, or another type?")
        hashed = verify == Verify.hash and entry is not None
        if hashed and entry is not None:
            to_hash.append((path, str(entry.get("sha256"))))
        fresh[name] = [*stamp, hashed]
    whole = verify == Verify.hash or sum(stamp[0] for stamp in fresh.values()) <= _READ_WHOLE
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda name: _check_ids(key, name, dtype, tokenizer, whole), fresh):
            pass
    if to_hash:
        log.info("reading %d token files to compare their hashes ...", len(to_hash))
        with ThreadPoolExecutor(_THREADS) as pool:
            for (path, prepared), digest in zip(to_hash, pool.map(lambda pair: hash_of(pair[0]), to_hash)):
                if digest != prepared:
                    expected = f"{path} as it was prepared (sha256 {prepared[:16]}...)"
                    hint = "the file has changed or was damaged: prepare it again"
                    raise UserError(key, expected, f"{digest[:16]}...", hint)
    if verify == Verify.hash and len(to_hash) < len(fresh):
        log.warning("%s: %d files have no hash in a manifest to compare with", key, len(fresh) - len(to_hash))
    if fresh and cache_file is not None:
        try:
            write_json(cache_file, known | fresh)
        except OSError as e:  # a read-only folder costs time, nothing else
            log.warning("%s cannot be written (%s): token files will be checked again next time", cache_file, e)
    return total
