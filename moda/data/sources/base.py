"""What a data source is: one way in which the ``data`` section says what a run trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from olmo_core.data.source_mixture import SourceMixtureDataset
from olmo_core.io import is_url

from moda.config.schema import DataConfig
from moda.data.mixture import Drawn
from moda.data.token_files import check_token_files, find_token_files, token_dtype
from moda.data.tokenizer import Tokenizer
from moda.errors import UserError
from moda.typed import from_dict

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """The ``data`` section, and what its sources need to know of the run.

    :param sequence_length: tokens of a sequence.
    :param total_tokens: tokens that the run trains on, where known.
    :param tokens_per_step: tokens of a batch, where known.
    """

    data: DataConfig
    tokenizer: Tokenizer
    sequence_length: int
    total_tokens: int | None = None
    tokens_per_step: int | None = None

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.config.vocab_size)

    def options(self, name: str, kind: type[T]) -> T:
        """What stands under ``data.source.NAME``, as a dataclass.

        :raises UserError: for an option that it does not have, or a value of another type.
        """
        key, given = f"data.source.{name}", (self.data.source or {}).get(name) or {}
        if not isinstance(given, dict):
            raise UserError(key, "a section of options", given)
        return from_dict(kind, given, key)

    def check(self, key: str, paths: list[str]) -> None:
        """Check token files as the section says; remote ones are passed over.

        :raises UserError: naming the first file that is wrong.
        """
        check_token_files(key, paths, self.tokenizer, verify=self.data.verify, cache=self.data.work_dir)

    def find(self, key: str, patterns: list[str]) -> list[str]:
        """Token files of paths, globs and URLs, checked."""
        paths = find_token_files(key, patterns)
        self.check(key, paths)
        return paths


@dataclass(frozen=True)
class Selection:
    """Token files to train on.

    :param paths: the files; of a mixture those of ``mixed``.
    :param labels: the source of every path.
    :param drawn: what comes from where.
    :param mixed: how many sequences come from each file, where not all do.
    :param validation: token files by label, where the source holds out some of its own.
    """

    paths: list[str]
    labels: list[str]
    drawn: list[Drawn]
    mixed: SourceMixtureDataset | None = None
    validation: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def whole(cls, paths: list[str], labels: list[str], width: int) -> Selection:
        """All of some files; tokens (of ``width`` bytes) of a label are not known where a file of it is remote."""
        files: dict[str, list[str]] = {}
        for path, label in zip(paths, labels):
            files.setdefault(label, []).append(path)
        drawn = []
        for label, names in files.items():
            remote = any(map(is_url, names))
            tokens = None if remote else sum(Path(name).stat().st_size // width for name in names)
            drawn.append(Drawn(label, len(names), tokens, tokens))
        return cls(paths, labels, drawn)


class DataSource:
    """A kind of training data. A new one is a subclass and a line in ``sources/__init__.py``."""

    #: The key of ``data`` that asks for it.
    name: ClassVar[str]

    def select(self, request: Request) -> Selection:
        """The token files to train on, made if need be, and checked.

        :raises UserError: for data that is missing, damaged, too little or made with another tokenizer.
        """
        raise NotImplementedError

    def preview(self, request: Request) -> list[Drawn]:
        """What would be drawn from where, without writing anything but caches."""
        return self.select(request).drawn


def stem(path: str) -> str:
    """The label of a token file that belongs to no named source: its name without shard number."""
    name = Path(path).stem
    head, _, tail = name.rpartition("-")
    return head if head and tail.isdigit() else name
