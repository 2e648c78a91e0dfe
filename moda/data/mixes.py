"""OLMo-core's data mixes by name: their files under a base directory, and a subset of them for a token budget.

The subset of B tokens is the same for everyone: within each source (label) of the mix, files are ordered by the SHA-256 of
``seed:path`` and taken until the source has its share of B, its share being that of its tokens in the whole mix. The last
file of each source is taken whole, so the subset holds a little more than B. It depends on the file names and sizes, B and
the seed alone. Five files that OLMoE-mix-0824 lists twice are in a subset once.
"""

import hashlib
import logging
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from olmo_core.data import DataMix
from olmo_core.io import get_file_size, is_url

from moda.config.schema import DataConfig
from moda.errors import UserError, nearest
from moda.files import read_json, write_json

from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

_THREADS = 32


def mix_paths(key: str, name: str, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(label, path relative to the base directory) of every file of a mix.

    :raises UserError: for a mix that is not known, or not for this tokenizer.
    """
    try:
        mix = DataMix(name)
    except ValueError:
        raise UserError(key, "a data mix of OLMo-core", name, nearest(name, [m.value for m in DataMix])) from None
    if tokenizer.hub is None:
        expected = f"a tokenizer that {name} exists for"
        raise UserError("data.tokenizer", expected, tokenizer.name, "set data.tokenizer.hub")
    try:
        paths, labels = mix.build("", tokenizer.hub)
    except (ValueError, FileNotFoundError) as e:
        raise UserError(key, f"a mix that exists for tokenizer {tokenizer.hub}", name, str(e)) from None
    return [(label, str(path).lstrip("/")) for path, label in zip(paths, labels)]


def choose_subset(
    files: list[tuple[str, str]], sizes: dict[str, int], tokens: int, width: int, seed: int = 0
) -> list[tuple[str, str]]:
    """The files of a mix that hold a token budget, in the mix's order.

    :param files: (label, path) of the mix.
    :param sizes: bytes of every path.
    :param width: bytes of a token.

    :raises UserError: if the whole mix holds less.
    """
    files = list(dict.fromkeys(files))
    total = sum(sizes[path] for _, path in files) // width
    if tokens > total:
        raise UserError("data.mix_tokens", f"at most the mix's {total:,} tokens", f"{tokens:,}")
    chosen = set()
    for label in dict.fromkeys(label for label, _ in files):
        paths = [path for one, path in files if one == label]
        available = sum(sizes[p] for p in paths) // width
        quota, taken = -(-available * tokens // total), 0
        for path in sorted(paths, key=lambda p: hashlib.sha256(f"{seed}:{p}".encode()).digest()):
            if taken >= quota:
                break
            chosen.add(path)
            taken += sizes[path] // width
    return [(label, path) for label, path in files if path in chosen]


def subset_file(folder: Path, mix: str, tokens: int | None, seed: int = 0) -> Path:
    """Where a local mirror says which files of a mix it holds."""
    what = "all" if tokens is None else f"{tokens}-{seed}"
    return folder / "mirror" / f"{mix}-{what}.json"


def load_sizes(
    key: str, base: str, mix: str, paths: list[str], folder: Path, size_of: Callable[[str], int] = get_file_size
) -> dict[str, int]:
    """The size in bytes of every file of a mix, asked once and remembered.

    :param key: what an error is about.
    :param base: folder or URL of the mix.
    :param folder: where the sizes are remembered.

    :raises UserError: naming the first file that cannot be reached.
    """
    cache = folder / f"sizes-{mix}-{hashlib.sha256(base.encode()).hexdigest()[:16]}.json"
    known: dict[str, int] = read_json(cache, key) if cache.is_file() else {}
    missing = [p for p in paths if p not in known]
    if missing:
        log.info("asking %s for the sizes of %d files ...", base, len(missing))
        pool = ThreadPoolExecutor(_THREADS)
        try:
            size_of(
                f"{base.rstrip('/')}/{missing[0]}"
            )  # alone: a place that cannot be reached is noticed soon, and once
            for path, size in zip(missing, pool.map(lambda p: size_of(f"{base.rstrip('/')}/{p}"), missing)):
                known[path] = size
        except Exception as e:  # each kind of storage has its own
            path = next(p for p in missing if p not in known)
            silent = isinstance(e, urllib.error.URLError) and not isinstance(e, urllib.error.HTTPError)
            expected = "a server that answers" if silent else f"a place that has {path}"
            raise UserError(key, expected, base, str(e).split("\n")[0]) from None
        finally:
            pool.shutdown(cancel_futures=True)
        write_json(cache, known)
    return {p: known[p] for p in paths}


def mix_files(key: str, name: str, data: DataConfig, tokenizer: Tokenizer, width: int) -> tuple[list[str], list[str]]:
    """Paths and labels of a mix under ``data.base_dir``, or of its subset; a local one must be complete.

    :param width: bytes of a token.
    """
    if data.base_dir is None:
        raise UserError("data.base_dir", f"the folder or URL under which {name} lies", hint=f"needed by {key}")
    files = mix_paths(key, name, tokenizer)
    base = data.base_dir.rstrip("/")
    tokens = data.mix_tokens if key == "data.mix" else None
    if tokens is not None:
        listed = None if is_url(base) else subset_file(Path(base), name, tokens)
        if listed is not None and listed.is_file():
            files = [(label, path) for label, path, _ in read_json(listed, "data.mix_tokens")["files"]]
        else:
            sizes = load_sizes("data.base_dir", base, name, [p for _, p in files], Path(data.work_dir))
            files = choose_subset(files, sizes, tokens, width)
    if not is_url(base):
        missing = [path for _, path in files if not Path(base, path).is_file()]
        if missing:
            got = f"{len(missing)} of them missing, the first {Path(base, missing[0])}"
            hint = f"scripts/prepare_data.py mirror {name} {base} downloads them"
            raise UserError("data.base_dir", f"the {len(files)} files of {name}", got, hint)
    return [f"{base}/{path}" for _, path in files], [label for label, _ in files]
