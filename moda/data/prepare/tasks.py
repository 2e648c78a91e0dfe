"""Tasks: what each one reads, and the files in which a preparation keeps its state.

Everything here is light: worker processes import it, and they need neither torch nor OLMo-core.
A preparation of ``OUT`` works in ``OUT.partial``, which becomes ``OUT`` by one rename when everything is there:

    tasks/00000.json       what task 0 reads (a list of pieces of one source)
    reads/00000.json       what its reader counted
    parts/00000.*          its token files, their document ends, and what they hold
    pack/00000.json        which stretches of which parts make shard 0
    packed/00000.json      what shard 0 holds, once it is written
    stages/<name>/         datatrove's logs, statistics and completion marks of one stage
    progress/<name>/       how far each task of a stage is
    errors/                why a task failed
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moda.data.formats import FORMATS, Piece, Records
from moda.data.text import find_files
from moda.files import read_json, write_json

if TYPE_CHECKING:
    from .options import PrepareOptions, SourceOptions

STATE = "state"  # the folder inside OUT.partial that holds all of the above but the finished shards
_SMALLEST, _LARGEST, _SHARES = 2 << 20, 256 << 20, 256
_HUGGINGFACE_SHARDS = 8


@dataclass(frozen=True)
class Task:
    """What one task reads: pieces of one source in order, and the settings of their :class:`moda.data.formats.Records`."""

    source: str
    pieces: list[Piece]
    settings: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(p.size for p in self.pieces)

    @property
    def records(self) -> Records:
        return Records(**self.settings)


def state_file(state: str | Path, kind: str, rank: int) -> Path:
    """The file of task or shard ``rank`` of one kind (``tasks``, ``reads``, ...) in the state folder."""
    return Path(state) / kind / f"{rank:05d}.json"


def read_state(state: str | Path, kind: str, rank: int) -> dict[str, Any]:
    """The contents of a :func:`state_file`.

    :raises UserError: if it is missing or damaged.
    """
    return read_json(state_file(state, kind, rank), "output")


def write_task(state: Path, rank: int, task: Task) -> None:
    """Write what task ``rank`` reads to the state folder."""
    write_json(state_file(state, "tasks", rank), asdict(task))


def read_task(state: str | Path, rank: int) -> Task:
    """What task ``rank`` reads."""
    data = read_state(state, "tasks", rank)
    return Task(data["source"], [Piece(**p) for p in data["pieces"]], data["settings"])


def _files(name: str, source: SourceOptions) -> dict[str, tuple[str, int]]:
    """Format and size in bytes of the files of a source, in a stable order, each once."""
    files: dict[str, tuple[str, int]] = {}
    for pattern in source.path if source.in_files else ():
        for file in find_files(f"sources.{name}.path", pattern, source.format, source.field):
            files.setdefault(file.path, (file.format.name, os.path.getsize(file.path)))
    return files


def make_tasks(options: PrepareOptions) -> tuple[list[Task], dict[str, dict[str, int]]]:
    """All tasks in order, and for each source its input files and bytes.

    Nothing here depends on workers or executor, so neither does the result.

    :raises UserError: for a path that gives no files.
    """
    sources = {name: options.source(name) for name in options.sources}
    files = {name: _files(name, source) for name, source in sources.items()}
    sizes = {name: [size for _, size in of_source.values()] for name, of_source in files.items()}
    total = sum(map(sum, sizes.values()))
    target = options.task_bytes or min(max(total // _SHARES, _SMALLEST), _LARGEST)
    tasks: list[Task] = []
    for name, source in sources.items():
        groups: list[list[Piece]] = []
        if not source.in_files:
            count = source.shards or _HUGGINGFACE_SHARDS
            groups = [[Piece(source.format, str(source.path[0]), i, count)] for i in range(count)]
        filled = target
        for path, (format, size) in files[name].items():
            for piece in FORMATS[format].pieces(path, size, target):
                if not groups or filled + piece.size > target:
                    groups.append([])
                    filled = 0
                groups[-1].append(piece)
                filled += max(piece.size, 1)
        settings = {
            "key": f"sources.{name}", "field": source.field, "bad_input": options.bad_input.value,
            "empty": options.empty.value,
            "options": {"config": source.config, "split": source.split, "streaming": source.streaming},
        }  # fmt: skip
        tasks += [Task(name, group, settings) for group in groups]
    return tasks, {name: {"files": len(of_source), "bytes": sum(of_source)} for name, of_source in sizes.items()}
