"""What one task reads, and the files in which a preparation keeps its state.

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

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["STATE", "Piece", "Task", "read_json", "read_task", "write_json"]

STATE = "state"  # the folder inside OUT.partial that holds all of the above but the finished shards


@dataclass(frozen=True)
class Piece:
    """A stretch of one input.

    :param kind: ``jsonl`` or ``lines`` (a document a line), ``text`` (a document a file), ``parquet`` or ``hf``.
    :param path: the file, or the name or folder of a Hugging Face dataset.
    :param start: first byte (plain ``jsonl`` and ``lines``), first row group (``parquet``) or shard (``hf``).
    :param end: byte, row group or number of shards that bounds it; -1 for the whole file.
    :param size: bytes of input, as far as they are known.
    """

    kind: str
    path: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Task:
    """What one task reads: pieces of one source, and how.

    :param source: the source's name.
    :param pieces: in order.
    :param field: the text field of a record.
    :param bad: ``error`` or ``skip``: what an unreadable record or file leads to.
    :param empty: the same for a document without text.
    :param hf: options of ``datasets.load_dataset`` for ``hf`` pieces.
    """

    source: str
    pieces: list[Piece]
    field: str
    bad: str
    empty: str
    hf: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(p.size for p in self.pieces)


def write_json(path: Path, data: Any, *, indent: int | None = None, durable: bool = False) -> None:
    """Write a JSON file that appears whole or not at all.

    :param durable: whether it survives a power failure (slower).

    :raises OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with scratch.open("w", encoding="utf-8") as f:
            json.dump(data, f, indent=indent, ensure_ascii=False)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_task(state: Path, rank: int, task: Task) -> None:
    write_json(state / "tasks" / f"{rank:05d}.json", asdict(task))


def read_task(state: Path, rank: int) -> Task:
    data = read_json(state / "tasks" / f"{rank:05d}.json")
    data["pieces"] = [Piece(**p) for p in data["pieces"]]
    return Task(**data)
