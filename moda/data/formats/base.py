"""What a text format is, and the checks that every record passes, whatever its format."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from moda.errors import UserError

from .compression import BROKEN

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one input.

    :param format: the name of its format.
    :param path: the file, or the name or folder of a Hugging Face dataset.
    :param start: where it begins, in the format's unit: bytes of lines, row groups of parquet, shards of a dataset.
    :param end: where it ends; -1 for the whole file.
    :param size: bytes of input, as far as they are known.
    """

    format: str
    path: str
    start: int = 0
    end: int = -1
    size: int = 0


class BadRecord(Exception):
    """Something that is no document: its kind as it is counted, what was expected, and what is wrong."""

    def __init__(self, kind: str, expected: str, hint: str | None = None) -> None:
        super().__init__(kind, expected, hint)
        self.kind, self.expected, self.hint = kind, expected, hint


def decode(data: bytes) -> str:
    """Bytes as UTF-8 text. Newlines stay as they are."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadRecord("invalid_utf8", "UTF-8 text", f"byte {e.start} of it: {e.reason}") from None


@dataclass
class Records:
    """The checks of one source's records. What fails them is an error that names the place, or is counted and left out.

    :param key: what an error is about (``data.text``, ``sources.web``).
    :param field: the text field of a record.
    :param bad_input: ``error`` or ``skip``, for what cannot be read.
    :param empty: the same for documents without text.
    :param options: further options of the source, for formats that have some.
    :param counts: what was left out, by kind.
    :param position: input bytes of the current piece that were read so far.
    """

    key: str
    field: str = "text"
    bad_input: str = "error"
    empty: str = "skip"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    position: int = 0

    def reject(self, e: BadRecord, where: str) -> None:
        """Count something that is no document, or stop at it.

        :raises UserError: where that was asked for.
        """
        option = "empty" if e.kind == "empty" else "bad_input"
        if getattr(self, option) == "error":
            skippable = None if self.key.startswith("data.") else f"{option}=skip leaves it out"
            hint = "; ".join(h for h in (e.hint, skippable) if h)
            raise UserError(self.key, f"{e.expected} in {where}", hint=hint or None)
        self.counts[e.kind] += 1

    def of_record(self, record: Any) -> Any:
        """The value of a record's text field."""
        if isinstance(record, dict) and self.field in record:
            return record[self.field]
        got = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise BadRecord("missing_field", f"a record with the field {self.field!r}", f"found {got[:200]}")

    def accept(self, extract: Callable[[Any], Any], data: Any, where: str) -> str | None:
        """The text that ``extract`` finds in ``data`` if it is that of a document, else None."""
        try:
            text = extract(data)
            if not isinstance(text, str):
                expected = f"a string in the field {self.field!r}"
                raise BadRecord("missing_field", expected, f"found {type(text).__name__}")
            if not text or text.isspace():
                raise BadRecord("empty", "a document with text")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as e:
                expected = "text that UTF-8 can hold"
                raise BadRecord("invalid_utf8", expected, f"character {e.start}: {e.reason}") from None
        except BadRecord as bad:
            self.reject(bad, where)
            return None
        return text


class TextFormat:
    """One way in which documents lie in files. A new one is a subclass and a line in ``formats/__init__.py``."""

    #: What configurations call it.
    name: ClassVar[str]
    #: Suffixes of its files, below that of a compression.
    suffixes: ClassVar[frozenset[str]] = frozenset()
    #: Whether files are recognized as of this format; otherwise it must be named.
    automatic: ClassVar[bool] = True
    #: Whether its inputs are files.
    in_files: ClassVar[bool] = True

    def recognizes(self, suffix: str, head: bytes, field: str) -> bool:
        """Whether a file is of this format.

        :param suffix: of its name, below that of a compression.
        :param head: its first bytes, decompressed.
        :param field: the text field of records.
        """
        return suffix in self.suffixes

    def pieces(self, path: str, size: int, target: int) -> Iterator[Piece]:
        """A file in pieces of about ``target`` bytes, where the format can be read from the middle."""
        yield Piece(self.name, path, size=size)

    def documents(self, piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        """(text, place) of every document of a piece, in order. The place is the path and, for example, a line number.

        :raises UserError: for what cannot be read, unless ``records`` leaves it out.
        """
        raise NotImplementedError


class FileFormat(TextFormat):
    """A format that is read as a stream of bytes, and so may be compressed."""

    def read(self, raw: IO[bytes], piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        """As :meth:`documents`, from the open file."""
        raise NotImplementedError

    def documents(self, piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        suffix = Path(piece.path).suffix.lower()
        try:
            with open(piece.path, "rb", buffering=_BUFFER) as raw:
                yield from self.read(raw, piece, records)
        except (*BROKEN, OSError) as e:
            if not isinstance(e, BROKEN) and e.errno is not None:
                raise UserError(records.key, f"a readable file {piece.path}", hint=str(e)) from None
            bad = BadRecord("broken_file", f"a whole {suffix.lstrip('.')} file", str(e) or type(e).__name__)
            records.reject(bad, piece.path)  # an OSError without a number is how bz2 says that its data is damaged
