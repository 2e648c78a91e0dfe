"""Sets of documents for perplexity: a set is an instance of a :class:`DocumentSet`, in a file beside this one and with a line
in ``SETS``. ``--text`` and ``--token-files`` make sets that have no line."""

from collections.abc import Sequence

from moda.errors import UserError, nearest

from ..model import ModelInfo
from .base import DocumentSet, MissingData, OpenSet, TokenDocument
from .text import Text
from .token_files import TokenFiles
from .validation_mix import TABLE_5

__all__ = [
    "PAPER_SETS", "SETS", "DocumentSet", "MissingData", "OpenSet", "Text", "TokenDocument", "TokenFiles", "open_sets",
    "resolve_sets",
]  # fmt: skip

#: Every set by name, in the order of tables. This is where a new one is registered.
SETS: dict[str, DocumentSet] = {entry.name: entry for entry in (*TABLE_5,)}
PAPER_SETS = tuple(entry.name for entry in TABLE_5)


def resolve_sets(names: Sequence[str]) -> list[DocumentSet]:
    """Sets by name, once each, in the order of tables.

    :raises UserError: for an unknown name, with the nearest known ones.
    """
    for name in names:
        if name not in SETS:
            raise UserError("--sets", "known sets", name, nearest(name, SETS))
    return [entry for name, entry in SETS.items() if name in names]


def open_sets(
    sets: Sequence[DocumentSet], model: ModelInfo, base_dir: str | None = None, *, skip_missing: bool = False
) -> tuple[list[OpenSet], dict[str, str]]:
    """Sets in the tokens of a model's tokenizer.

    :param base_dir: where the paper's sets lie.
    :param skip_missing: leave out sets whose data is absent.

    :returns: the sets, and why each one that was left out is missing.

    :raises UserError: for absent or unsuitable data, or two sets of one name.
    """
    names = [entry.name for entry in sets]
    if len(set(names)) < len(names):
        raise UserError("--text", "a different name for every set", ", ".join(names))
    opened: list[OpenSet] = []
    missing: dict[str, str] = {}
    for entry in sets:
        try:
            opened.append(entry.open(model, base_dir))
        except MissingData as e:
            if not skip_missing:
                raise
            missing[entry.name] = str(e)
    return opened, missing
