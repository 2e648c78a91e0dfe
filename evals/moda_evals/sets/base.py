"""What a set of documents is: a name, and documents as token ids of a model's tokenizer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moda.errors import UserError

from ..model import ModelInfo


class MissingData(UserError):
    """A set's data is absent, which ``--skip-missing`` forgives."""


@dataclass(frozen=True)
class TokenDocument:
    """Ids of one document, its end token included, and the bytes of its text where they are known."""

    ids: np.ndarray
    n_bytes: int | None


@dataclass(frozen=True)
class OpenSet:
    """A set whose data is there; ``source`` says where, ``documents`` reads it, ``files`` are what it lies in."""

    name: str
    title: str
    source: str
    documents: Callable[[], Iterator[TokenDocument]]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class DocumentSet(ABC):
    """A set of documents. Subclasses say where they come from.

    :param name: its stable name in options and results.
    :param title: its name in tables.
    """

    name: str
    title: str

    @abstractmethod
    def open(self, model: ModelInfo, base_dir: str | None = None) -> OpenSet:
        """Check that the data is there and suits the model; nothing large is read yet.

        :param base_dir: the folder or URL of ``--base-dir``.

        :raises MissingData: for absent data.
        :raises UserError: for data that does not suit the model.
        """
