"""Plain text: a document per file."""

import codecs
from collections.abc import Iterator
from typing import IO

from .base import FileFormat, Piece, Records, decode
from .compression import open_contents

_CODE = frozenset({
    ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".html",
    ".xml", ".css", ".sh", ".json", ".yaml", ".yml", ".toml",
})  # fmt: skip
TEXT_SUFFIXES = _CODE | {".txt"}


class Text(FileFormat):
    """A document per file, whatever its name; a folder gives its files of known suffixes."""

    name = "text"
    suffixes = TEXT_SUFFIXES

    def read(self, raw: IO[bytes], piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        data = open_contents(raw, piece.path).read().removeprefix(codecs.BOM_UTF8)
        text = records.accept(decode, data, piece.path)
        if text is not None:
            yield text, piece.path


class Code(Text):
    """A document per file; a folder gives its program text and mark-up."""

    name = "code"
    suffixes = _CODE
    automatic = False
