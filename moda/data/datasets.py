"""OLMo-core's datasets of token files, as this project builds them.

Two things are ours. An id beyond the vocabulary is an error that names its file. And in a mixture the seed decides which
sequences of a file are taken: OLMo-core 3.0.0 samples document indices that it then does not read, and takes the first
sequences of every file; that sampling, which reads all files once, is left out.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from olmo_core.data import NumpyFSLDatasetConfig
from olmo_core.data.numpy_dataset import NumpyFSLDataset, NumpyFSLDatasetMixture
from olmo_core.data.source_mixture import SourceMixtureDataset
from olmo_core.data.utils import load_array_slice_into_tensor
from olmo_core.io import get_file_size

from moda.errors import UserError


def affine(count: int, seed: int, file: int) -> tuple[int, int]:
    """(step, offset) of the order of a file's sequences: position p is sequence ``(p * step + offset) % count``.

    The step has no divisor in common with the count, so that every sequence has one position. It needs no memory.
    """
    if count < 2:
        return 1, 0
    rng = np.random.default_rng((seed, file))
    step, offset = int(rng.integers(1, count)), int(rng.integers(0, count))
    while math.gcd(step, count) != 1:
        step += 1
    return step, offset


def _checked(ids: torch.Tensor, path: Any, vocab_size: int) -> torch.Tensor:
    if len(ids) and int(ids.max()) >= vocab_size:
        raise UserError("data", f"token ids below {vocab_size} in {path}", int(ids.max()))
    return ids


class TokenDataset(NumpyFSLDataset):
    """OLMo-core's sequences of fixed length, whose ids are checked as they are read."""

    def _read_chunk_from_array(self, path: Any, index: int, dtype: Any = None) -> torch.Tensor:
        return _checked(super()._read_chunk_from_array(path, index, dtype), path, self.vocab_size)


class SeededMixture(NumpyFSLDatasetMixture):
    """OLMo-core's mixture dataset, whose sequences within a file are chosen by the seed.

    A file that is repeated gives all its sequences each full time, and the first of its order in the rest.
    """

    def prepare(self) -> None:
        len(self)  # without the document indices, which nothing reads

    @property
    def mixture_seed(self) -> int:
        return self._seed

    @property
    def drawn(self) -> list[int]:
        return list(self._path_offset_index.values())

    @property
    def fingerprint_fields(self) -> tuple[str, ...]:
        return (*super().fingerprint_fields, "mixture_seed", "drawn")  # the order is one of all that is drawn

    def _order(self, path: str) -> tuple[int, int, int]:
        """(sequences, step, offset) of a file's order, worked out once per process."""
        cache: dict[str, tuple[int, int, int]] = self.__dict__.setdefault("_orders", {})
        if path not in cache:
            numbers: dict[str, int] = self.__dict__.setdefault("_numbers", {})
            if not numbers:
                for p in map(str, self.paths):
                    numbers.setdefault(p, len(numbers))
            count = get_file_size(path) // (self.dtype(0).itemsize * self.sequence_length)
            cache[path] = (count, *affine(count, self._seed, numbers[path]))
        return cache[path]

    def _read_chunk_from_array(self, path: Any, index: int, dtype: Any = None) -> torch.Tensor:
        count, step, offset = self._order(str(path))
        start = (index * step + offset) % count * self.sequence_length
        ids = load_array_slice_into_tensor(path, start, start + self.sequence_length, dtype or self.dtype)
        return _checked(ids, path, self.vocab_size)


@dataclass(kw_only=True)
class TrainingDatasetConfig(NumpyFSLDatasetConfig):
    """Builds a :class:`TokenDataset` of ``paths``, or a :class:`SeededMixture` where ``drawn`` says what comes from where."""

    drawn: SourceMixtureDataset | None = None
    seed: int = 0

    def build(self) -> NumpyFSLDataset:
        names = ("pad_token_id", "eos_token_id", "vocab_size", "bos_token_id")
        common: dict[str, Any] = {name: getattr(self.tokenizer, name) for name in names}
        common |= {name: getattr(self, name) for name in ("sequence_length", "metadata", "generate_doc_lengths")}
        common["dtype"] = self.get_dtype()
        dataset: NumpyFSLDataset
        if self.drawn is None:
            dataset = TokenDataset(*(self.paths or []), **common)
        else:
            index = self.drawn.to_index()
            dataset = SeededMixture(*self.drawn.to_paths(), seed=self.seed, path_offset_index=index, **common)
        self._finalize(dataset)
        return dataset
