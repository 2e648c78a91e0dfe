"""Finding the inputs of a preparation and cutting them into tasks, by their sizes alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moda.data.text import TEXT_SUFFIXES
from moda.errors import UserError

from .options import Format, PrepareOptions, SourceOptions
from .tasks import Piece, Task

__all__ = ["find_inputs", "make_tasks"]

COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
_JSONL = (".jsonl", ".ndjson")
_NOT_CODE = {".txt", ".jsonl"}
_SKIPPED_FOLDERS = {".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv"}
_SMALLEST, _LARGEST, _SHARES = 2 << 20, 256 << 20, 256


def _suffix(path: str) -> str:
    """The suffix that tells the format, below a compression's."""
    p = Path(path.lower())
    return Path(p.stem).suffix if p.suffix in COMPRESSED else p.suffix


def _kind(path: str, format: Format) -> str:
    if format == Format.auto:
        suffix = _suffix(path)
        return "jsonl" if suffix in _JSONL else "parquet" if suffix == ".parquet" else "text"
    return "text" if format in (Format.text, Format.code) else format.value


def _wanted(path: str, format: Format) -> bool:
    """Whether a file found in a folder (not one given by name) is part of a source."""
    suffix = _suffix(path)
    if format == Format.jsonl:
        return suffix in _JSONL
    if format == Format.parquet:
        return suffix == ".parquet"
    if format == Format.code:
        return suffix in TEXT_SUFFIXES - _NOT_CODE
    if format in (Format.text, Format.lines):
        return suffix in TEXT_SUFFIXES - set(_JSONL)
    return suffix in TEXT_SUFFIXES | {".parquet", *_JSONL}


def _in_folder(folder: str, format: Format) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            path = os.path.join(here, name)
            if _wanted(path, format):
                yield path


def find_inputs(name: str, source: SourceOptions) -> list[tuple[str, int]]:
    """The files of a source and their sizes, in a stable order, each once.

    :raises UserError: for a path that gives none.
    """
    found: dict[str, int] = {}
    for pattern in source.path:
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            paths = list(_in_folder(pattern, source.format))
            wanted = "a folder with files of a known kind"
        else:
            matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            paths = []
            for m in matches:
                paths += list(_in_folder(m, source.format)) if os.path.isdir(m) else [m]
            wanted = "files, folders or globs that exist"
        if not paths:
            raise UserError(f"sources.{name}.path", wanted, pattern)
        for path in paths:
            found.setdefault(path, os.path.getsize(path))
    return list(found.items())


def _pieces(name: str, path: str, size: int, kind: str, target: int) -> Iterator[Piece]:
    plain = Path(path).suffix.lower() not in COMPRESSED
    if kind in ("jsonl", "lines") and plain and size > target:
        count = -(-size // target)
        cuts = [size * i // count for i in range(count + 1)]
        for start, end in zip(cuts, cuts[1:]):
            yield Piece(kind, path, start, end, end - start)
    elif kind == "parquet" and size > target:
        yield from _row_groups(path, size, target)
    else:
        yield Piece(kind, path, 0, -1, size)


def _row_groups(path: str, size: int, target: int) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        yield Piece("parquet", path, 0, -1, size)  # broken: its task says so, as configured
        return
    weights = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    scale = size / max(sum(weights), 1)
    first, held = 0, 0.0
    for i, weight in enumerate(weights):
        held += weight * scale
        if held >= target or i == len(weights) - 1:
            yield Piece("parquet", path, first, i + 1, int(held))
            first, held = i + 1, 0.0


def _hf_options(source: SourceOptions) -> dict[str, Any]:
    """How ``datasets`` loads a source; a folder written by ``save_to_disk`` is told by its files."""
    path = Path(str(source.path[0])).expanduser()
    load: dict[str, Any] = {"split": source.split}
    if source.config is not None:
        load["name"] = source.config
    saved = path.is_dir() and (path / "state.json").is_file()
    return {"load": load, "streaming": source.streaming and not saved, "from_disk": saved}


def make_tasks(options: PrepareOptions) -> tuple[list[Task], dict[str, dict[str, int]]]:
    """All tasks in order, and for each source its input files and bytes.

    Nothing here depends on workers or executor, so neither does the result.
    """
    found = {
        name: [] if options.source(name).format == Format.huggingface else find_inputs(name, options.source(name))
        for name in options.sources
    }
    total = sum(size for files in found.values() for _, size in files)
    target = options.task_bytes or min(max(total // _SHARES, _SMALLEST), _LARGEST)
    tasks: list[Task] = []
    inputs: dict[str, dict[str, int]] = {}
    for name, files in found.items():
        source = options.source(name)
        hf: dict[str, Any] = {}
        if source.format == Format.huggingface:
            hf, count = _hf_options(source), source.shards or 8
            groups = [[Piece("hf", str(source.path[0]), i, count, 0)] for i in range(count)]
        else:
            groups = []
            held = target
            for path, size in files:
                for piece in _pieces(name, path, size, _kind(path, source.format), target):
                    if held + piece.size > target:
                        groups.append([])
                        held = 0
                    groups[-1].append(piece)
                    held += max(piece.size, 1)
        common = (source.field, options.bad_input.value, options.empty.value, hf)
        tasks += [Task(name, group, *common) for group in groups]
        inputs[name] = {"files": len(files), "bytes": sum(size for _, size in files)}
    return tasks, inputs
