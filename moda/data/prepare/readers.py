"""The first step of a stage: the documents of a task, read as everywhere, counted, and its progress noted."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseReader

from moda.data.formats import FORMATS
from moda.files import write_json

from .tasks import read_task, state_file

_PROGRESS_SECONDS = 0.5


class TaskReader(BaseReader):
    """The documents of task ``rank``, whatever worker runs it.

    datatrove's own readers log what they cannot read and continue; here every such record is an error that names the file
    and the place, or is counted and reported, as configured.

    :param state: the state folder of the preparation.
    :param stage: the stage that reads, for its progress; what was counted is kept for the stage ``tokenize`` only.
    """

    name = "tasks of a preparation"

    def __init__(self, state: str, stage: str) -> None:
        super().__init__()
        self.state, self.stage = state, stage

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # type: ignore[override]
        task = read_task(self.state, rank)
        records, note = task.records, Path(self.state) / "progress" / self.stage / f"{rank:05d}"
        note.parent.mkdir(parents=True, exist_ok=True)
        read, noted = 0, 0.0  # bytes of the pieces before this one; the time of the last note
        for piece in task.pieces:
            records.position = 0
            for text, place in FORMATS[piece.format].documents(piece, records):
                records.counts["documents"] += 1
                if time.monotonic() - noted > _PROGRESS_SECONDS:
                    noted = time.monotonic()
                    note.write_text(json.dumps([read + records.position, records.counts["documents"]]))
                yield Document(text=text, id=place)
            read += piece.size
        note.write_text(json.dumps([read, records.counts["documents"]]))
        if self.stage == "tokenize":
            write_json(state_file(self.state, "reads", rank), records.counts)
