"""Reading documents: text, JSON lines, parquet and Hugging Face datasets, plain or compressed.

datatrove's own readers log what they cannot read and go on; here every such record is an error that names the file and the
place, or is counted and reported, as configured.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.readers import HuggingFaceDatasetReader
from datatrove.pipeline.readers.base import BaseReader

from moda.errors import UserError

from .tasks import Piece, Task, read_task, write_json

__all__ = ["COMPRESSED", "TaskReader", "open_stream"]

COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_BLOCK = 1 << 20
_PROGRESS_SECONDS = 0.5


class _ZstdStream(io.RawIOBase):
    """A zstd file with any number of frames. The library's own reader takes a frame that was cut short for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._raw.read(_BLOCK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame was cut short")
                return 0
            out = []
            while data:
                if self._frame is None:
                    self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                out.append(self._frame.decompress(data))
                if not self._frame.eof:
                    break
                data, self._frame = self._frame.unused_data, None
            self._ready = memoryview(b"".join(out))
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def open_stream(raw: IO[bytes], path: str) -> IO[bytes]:
    """The contents of a file that is open for reading, decompressed as its suffix says."""
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), _BLOCK)  # type: ignore[arg-type, return-value]
    return raw


class _Rows(HuggingFaceDatasetReader):
    """datatrove's Hugging Face reader; rows go through the task's checks instead of being dropped in silence."""

    def __init__(self, reader: TaskReader, task: Task, dataset: str) -> None:
        options = dict(task.hf)
        super().__init__(
            dataset,
            dataset_options=options.get("load") or {},
            streaming=bool(options.get("streaming")),
            load_from_disk=bool(options.get("from_disk")),
            batch_size=256,
            text_key=task.field,
        )
        self.reader, self.task = reader, task

    def get_document_from_dict(self, data: dict, source_file: str, id_in_file: int | str) -> Document | None:
        where = f"row {id_in_file} of dataset {source_file}"
        text = self.reader.field_of(self.task, data, where)
        return None if text is None else Document(text=text, id=f"{source_file}#{id_in_file}")


class TaskReader(BaseReader):
    """datatrove's first step: the documents of task ``rank``, whatever worker runs it.

    :param state: the state folder of the preparation.
    :param stage: the stage that reads, for its progress; what was counted is kept for the stage ``tokenize`` only.
    """

    name = "tasks of a preparation"

    def __init__(self, state: str, stage: str) -> None:
        super().__init__()
        self.state, self.stage = state, stage
        self.counts: Counter = Counter()
        self._done = self._within = 0  # input bytes of the pieces that were read, and of the one being read
        self._rank = 0
        self._noted = 0.0

    # -- records -----------------------------------------------------------------------------------------------

    def _bad(self, task: Task, kind: str, expected: str, where: str, hint: str | None = None) -> None:
        """Stop at something unreadable, or count it."""
        policy, option = (task.empty, "empty") if kind == "empty" else (task.bad, "bad_input")
        if policy == "error":
            note = f"{option}=skip leaves it out"
            raise UserError(
                f"sources.{task.source}", f"{expected} at {where}", hint=f"{hint}; {note}" if hint else note
            )
        self.counts[kind] += 1

    def checked(self, task: Task, text: Any, where: str) -> str | None:
        """A document's text if it is one, else None."""
        if not isinstance(text, str):
            self._bad(
                task, "missing_field", f"a string in the field {task.field!r}", where, f"found {type(text).__name__}"
            )
            return None
        if not text or text.isspace():
            self._bad(task, "empty", "a document with text", where)
            return None
        return text

    def field_of(self, task: Task, record: Any, where: str) -> str | None:
        """The text field of a record."""
        if not isinstance(record, dict) or task.field not in record:
            fields = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            self._bad(task, "missing_field", f"a record with the field {task.field!r}", where, f"found {fields[:200]}")
            return None
        return self.checked(task, record[task.field], where)

    def _decoded(self, task: Task, data: bytes, where: str) -> str | None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            self._bad(task, "invalid_utf8", "UTF-8 text", where, f"byte {e.start} of it: {e.reason}")
            return None

    def _line(self, task: Task, kind: str, line: bytes, where: str) -> str | None:
        if kind == "lines":
            text = self._decoded(task, line.rstrip(b"\r\n"), where)
            return None if text is None else self.checked(task, text, where)
        if not line.strip():
            return None  # a blank line between records is no record
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as e:
            if self._decoded(task, line, where) is not None:
                self._bad(task, "invalid_json", "a JSON object", where, str(e))
            return None
        return self.field_of(task, record, where)

    # -- files -------------------------------------------------------------------------------------------------

    def _lines(self, task: Task, piece: Piece, raw: IO[bytes]) -> Iterator[tuple[str, str]]:
        """Documents of a line each. A piece owns the lines that begin in it."""
        position = 0
        if piece.start > 0:
            raw.seek(piece.start - 1)
            position = piece.start - 1 + len(raw.readline())
        stream = open_stream(raw, piece.path)
        number = 0
        while piece.end < 0 or position < piece.end:
            line = stream.readline()
            if not line:
                break
            number += 1
            where = f"{piece.path}, " + (f"line {number}" if piece.start == 0 else f"byte {position}")
            text = self._line(task, piece.kind, line, where)
            position += len(line)
            if text is not None:
                yield text, where
            self._within = (position - piece.start) if piece.end >= 0 else raw.tell()

    def _text(self, task: Task, piece: Piece, raw: IO[bytes]) -> Iterator[tuple[str, str]]:
        text = self._decoded(task, open_stream(raw, piece.path).read(), piece.path)
        if text is not None and (text := self.checked(task, text, piece.path)) is not None:
            yield text, piece.path

    def _parquet(self, task: Task, piece: Piece) -> Iterator[tuple[str, str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(piece.path)
        except (pa.ArrowException, OSError) as e:
            self._bad(task, "broken_file", "a whole parquet file", piece.path, str(e).split("\n")[0])
            return
        with file:
            if task.field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                self._bad(task, "missing_field", f"a column {task.field!r}", piece.path, f"found {names[:200]}")
                return
            groups = range(piece.start, file.num_row_groups if piece.end < 0 else piece.end)
            row = 0
            try:
                for batch in file.iter_batches(256, row_groups=list(groups), columns=[task.field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        where = f"{piece.path}, row {row} from row group {piece.start}"
                        if isinstance(value, bytes) and (value := self._decoded(task, value, where)) is None:
                            continue
                        if (text := self.checked(task, value, where)) is not None:
                            yield text, where
            except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
                kind = "invalid_utf8" if isinstance(e, UnicodeDecodeError) else "broken_file"
                self._bad(task, kind, "readable data", f"{piece.path} after row {row}", str(e).split("\n")[0])

    def _file(self, task: Task, piece: Piece) -> Iterator[tuple[str, str]]:
        try:
            raw = open(piece.path, "rb", buffering=_BLOCK)
        except OSError as e:
            raise UserError(f"sources.{task.source}", f"a readable file {piece.path}", hint=str(e)) from None
        with raw:
            reader = self._text if piece.kind == "text" else self._lines
            try:
                yield from reader(task, piece, raw)
            except _BROKEN as e:
                kind = Path(piece.path).suffix.lstrip(".")
                self._bad(task, "broken_file", f"a whole {kind} file", piece.path, str(e) or type(e).__name__)
            except OSError as e:
                if not piece.path.lower().endswith(".bz2"):  # which says so of damaged data
                    raise UserError(f"sources.{task.source}", f"a readable file {piece.path}", hint=str(e)) from None
                self._bad(task, "broken_file", "a whole bz2 file", piece.path, str(e))

    def documents(self, task: Task) -> Iterator[tuple[str, str]]:
        """Text and place of every document of a task, in order."""
        for piece in task.pieces:
            if piece.kind == "hf":
                for d in _Rows(self, task, piece.path).run(None, piece.start, piece.end):
                    yield d.text, d.id
            elif piece.kind == "parquet":
                yield from self._parquet(task, piece)
            else:
                yield from self._file(task, piece)
            self._done, self._within = self._done + piece.size, 0

    # -- the step ----------------------------------------------------------------------------------------------

    def _note(self, force: bool = False) -> None:
        """Leave a note of how far this task is, now and then."""
        now = time.monotonic()
        if force or now - self._noted > _PROGRESS_SECONDS:
            self._noted = now
            note: dict[str, int] = {"bytes": self._done + self._within, "documents": self.counts["documents"]}
            path = Path(self.state) / "progress" / self.stage / f"{self._rank:05d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(orjson.dumps(note))

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self._rank = rank
        self.counts, self._done, self._within = Counter(), 0, 0
        for text, where in self.documents(read_task(Path(self.state), rank)):
            self.counts["documents"] += 1
            self._note()
            yield Document(text=text, id=where)
        self._note(force=True)
        if self.stage == "tokenize":
            write_json(Path(self.state) / "reads" / f"{rank:05d}.json", dict(self.counts))
