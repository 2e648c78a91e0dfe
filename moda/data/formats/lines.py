"""Documents of a line each: JSON lines, and plain lines."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from .base import BadRecord, FileFormat, Piece, Records, decode
from .compression import compression_of, open_contents
from .text import TEXT_SUFFIXES

_OBJECT = re.compile(rb'\s*\{\s*"')


class Lines(FileFormat):
    """A document per line. A line ends at a newline character and nowhere else."""

    name = "lines"
    suffixes = TEXT_SUFFIXES
    automatic = False

    def pieces(self, path: str, size: int, target: int) -> Iterator[Piece]:
        if size <= target or compression_of(path):
            yield Piece(self.name, path, size=size)
            return
        count = -(-size // target)
        cuts = [size * i // count for i in range(count + 1)]
        for start, end in zip(cuts, cuts[1:]):
            yield Piece(self.name, path, start, end, end - start)

    def text_of(self, line: bytes, records: Records) -> Any:
        """The text that a line holds."""
        return decode(line.removesuffix(b"\n").removesuffix(b"\r"))

    def is_record(self, line: bytes) -> bool:
        """Whether a line counts at all."""
        return True

    def read(self, raw: IO[bytes], piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        """A piece owns the lines that begin in it."""
        position = number = 0
        if piece.start > 0:
            raw.seek(piece.start - 1)
            position = piece.start - 1 + len(raw.readline())
        stream = open_contents(raw, piece.path)
        while (piece.end < 0 or position < piece.end) and (line := stream.readline()):
            number += 1
            where = f"{piece.path}, " + (f"line {number}" if piece.start == 0 else f"byte {position}")
            begins, position = position == 0, position + len(line)
            records.position = (position - piece.start) if piece.end >= 0 else raw.tell()
            if begins:
                line = line.removeprefix(codecs.BOM_UTF8)
            if self.is_record(line):
                text = records.accept(lambda line: self.text_of(line, records), line, where)
                if text is not None:
                    yield text, where


class JsonLines(Lines):
    """A JSON object per line, with the text in one of its fields. Blank lines are passed over."""

    name = "jsonl"
    suffixes = frozenset({".jsonl", ".ndjson"})
    automatic = True

    def recognizes(self, suffix: str, head: bytes, field: str) -> bool:
        """By the name, or by the first lines where the name says something else (``c4-train.00000-of-01024.json.gz``).

        Those are JSON lines if they are objects, and either the first one has the text field or a text file has several.
        """
        if suffix in self.suffixes:
            return True
        first, *rest = [line for line in head.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()] or [b""]
        if not _OBJECT.match(first):
            return False
        try:
            record = json.loads(first)
        except (ValueError, RecursionError):  # the beginning of a long line, a damaged one, or JSON over several lines
            return json.dumps(field).encode() in first and (not rest or bool(_OBJECT.match(rest[0])))
        return field in record or (suffix in TEXT_SUFFIXES and bool(rest) and bool(_OBJECT.match(rest[0])))

    def is_record(self, line: bytes) -> bool:
        return bool(line.strip())

    def text_of(self, line: bytes, records: Records) -> Any:
        text = decode(line)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as e:
            reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
            raise BadRecord("invalid_json", "a JSON object", reason) from None
        return records.of_record(record)
