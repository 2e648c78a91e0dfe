"""Text formats, and how the format of a file is recognized.

A format is a class in a file of its own and a line in ``FORMATS``. Worker processes import this package: it must load neither
torch nor OLMo-core.
"""

from .base import Piece, Records, TextFormat
from .compression import format_suffix, read_head
from .huggingface import HuggingFace
from .lines import JsonLines, Lines
from .parquet import Parquet
from .text import Code, Text

__all__ = ["AUTO", "FORMATS", "Piece", "Records", "TextFormat", "detect"]

#: By name. Files are tried against them in this order.
FORMATS: dict[str, TextFormat] = {f.name: f for f in (Parquet(), JsonLines(), Text(), Lines(), Code(), HuggingFace())}
AUTO = "auto"  # the name for: each file's own


def detect(path: str, name: str = AUTO, field: str = "text") -> TextFormat | None:
    """The format of a file, by its name and its first bytes, or None if it is of no known format.

    :param name: the only format that it may be of, or ``auto``.
    :param field: the text field of records.
    """
    suffix, head = format_suffix(path), read_head(path)
    allowed = (f for f in FORMATS.values() if (f.automatic if name == AUTO else f.name == name))
    return next((f for f in allowed if f.recognizes(suffix, head, field)), None)
