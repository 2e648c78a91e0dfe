"""Several sources in given shares, on OLMo-core's source mixture.

OLMo-core decides how many instances (sequences) come from each file: shares of the sources by ratio, files of a source in
proportion to their size, rounding by largest remainder. Two things are ours. Which instances of a file are taken depends on
the seed: OLMo-core 3.0.0 samples document indices that it then does not read, and takes the first instances of every file.
And that sampling, which reads all files once, is left out.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olmo_core.data import NumpyFSLDatasetConfig
from olmo_core.data.numpy_dataset import NumpyFSLDatasetMixture
from olmo_core.data.source_mixture import (
    SourceMixtureConfig,
    SourceMixtureDataset,
    SourceMixtureDatasetConfig,
    SourceMixtureList,
)
from olmo_core.data.utils import load_array_slice_into_tensor
from olmo_core.io import get_file_size

from moda.config.schema import MixtureSection
from moda.errors import UserError

__all__ = ["Drawn", "MixtureDatasetConfig", "SeededMixture", "affine", "draw", "label_of", "stem"]


@dataclass(frozen=True)
class Drawn:
    """What a run draws from one source.

    :param name: the source.
    :param files: token files it is drawn from.
    :param available: tokens the source has, or None if that was not asked (remote files).
    :param tokens: tokens drawn, whole sequences; None as above.
    """

    name: str
    files: int
    available: int | None
    tokens: int | None

    def describe(self, total: int | None) -> dict[str, Any]:
        """For the run's record."""
        share = None if not total or self.tokens is None else self.tokens / total
        repeated = None if not self.available or self.tokens is None else self.tokens / self.available
        return {
            "source": self.name, "files": self.files, "available_tokens": self.available, "drawn_tokens": self.tokens,
            "share": share, "times_through": repeated,
        }  # fmt: skip


def affine(count: int, seed: int, file: int) -> tuple[int, int]:
    """(step, offset) of the order of a file's instances: position p is instance ``(p * step + offset) % count``.

    The step has no divisor in common with the count, so that every instance has one position. It needs no memory.
    """
    if count < 2:
        return 1, 0
    rng = np.random.default_rng((seed, file))
    step, offset = int(rng.integers(1, count)), int(rng.integers(0, count))
    while math.gcd(step, count) != 1:
        step += 1
    return step, offset


class SeededMixture(NumpyFSLDatasetMixture):
    """OLMo-core's mixture dataset, whose instances within a file are chosen by the seed.

    A file that is repeated gives all its instances each full time, and the first of its order in the rest.
    """

    def prepare(self) -> None:
        len(self)  # without the document indices, which nothing reads

    @property
    def mixture_seed(self) -> int:
        return self._seed

    @property
    def fingerprint_fields(self) -> tuple[str, ...]:
        return (*super().fingerprint_fields, "mixture_seed")

    def _order(self, path: str) -> tuple[int, int, int]:
        """(instances, step, offset) of a file's order, worked out once a process."""
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
        return load_array_slice_into_tensor(path, start, start + self.sequence_length, dtype or self.dtype)


@dataclass(kw_only=True)
class MixtureDatasetConfig(NumpyFSLDatasetConfig):
    """Builds a :class:`SeededMixture` from what :func:`draw` decided."""

    drawn: SourceMixtureDataset | None = None
    seed: int = 0

    def build(self) -> SeededMixture:
        assert self.drawn is not None
        dataset = SeededMixture(
            *self.drawn.to_paths(),
            seed=self.seed,
            path_offset_index=self.drawn.to_index(),
            sequence_length=self.sequence_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.get_dtype(),
            metadata=self.metadata,
            generate_doc_lengths=self.generate_doc_lengths,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        self._finalize(dataset)
        return dataset


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """OLMo-core logs a line a file."""
    logger = logging.getLogger("olmo_core.data.source_mixture")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def shares(mixture: MixtureSection) -> dict[str, float]:
    """The sources' shares of the whole, adding up to 1."""
    weights = {n: float(s.ratio if s.ratio is not None else s.tokens or 0) for n, s in mixture.sources.items()}
    total = sum(weights.values())
    return {n: w / total for n, w in weights.items()}


def draw(
    mixture: MixtureSection,
    files: dict[str, list[str]],
    *,
    total_tokens: int,
    tokens_per_step: int,
    sequence_length: int,
    dtype: Any,
) -> tuple[SourceMixtureDataset, list[Drawn]]:
    """Decide how many tokens come from which file.

    :param files: the sources' token files.
    :param total_tokens: what the run trains on.
    :param dtype: numpy type of the token files.

    :raises UserError: naming the source that is too small, and by how much.
    """
    width = np.dtype(dtype).itemsize
    available = {
        n: sum(get_file_size(p) // width // sequence_length for p in paths) * sequence_length
        for n, paths in files.items()
    }
    budget = sum(s.tokens or 0 for s in mixture.sources.values())
    if budget and budget < total_tokens:
        raise UserError(
            "data.mixture",
            f"budgets of at least the run's {total_tokens:,} tokens",
            f"{budget:,}",
            "or shorten train.max_tokens",
        )
    parts = shares(mixture)
    for name, source in mixture.sources.items():
        need, most = int(total_tokens * parts[name]), int(available[name] * source.max_repetition)
        if need > most:
            times = f"{need / available[name]:.2f}" if available[name] else "any number of"
            hint = f"{times} times through it: lower its share, shorten the run, or raise its max_repetition"
            raise UserError(
                f"data.mixture.sources.{name}",
                f"{need:,} tokens ({parts[name]:.1%} of the run)",
                f"{available[name]:,} x max_repetition {source.max_repetition:g}",
                hint,
            )
    config = SourceMixtureDatasetConfig(
        source_list=SourceMixtureList(
            sources=[
                SourceMixtureConfig(
                    source_name=name,
                    target_ratio=parts[name],
                    paths=list(files[name]),
                    # OLMo-core truncates; a source that is used up exactly must not fail for that.
                    max_repetition_ratio=source.max_repetition + 1e-6,
                )
                for name, source in mixture.sources.items()
            ]
        ),
        requested_tokens=total_tokens,
        global_batch_size=tokens_per_step,
        processes=8,
        seed=mixture.seed,
        render_tables=False,
        quiet=True,
    )
    with _quietly():
        drawn = config.build(npdtype=dtype, sequence_length=sequence_length)
    drawn.filter_zero_token_paths = True
    found = []
    for outcome in drawn.sources:
        used = {p.path for p in outcome.path_tokens if p.tokens}
        taken = sum(p.tokens for p in outcome.path_tokens)
        found.append(Drawn(outcome.name, len(used), available[outcome.name], taken))
    return drawn, found


def label_of(drawn: SourceMixtureDataset) -> list[str]:
    """The source of every path of the dataset, in order."""
    return [o.name for o in drawn.sources for p in o.path_tokens if p.tokens > 0]


def stem(path: str) -> str:
    """The label of a token file that belongs to no named source: its name without shard number."""
    name = Path(path).stem
    head, _, tail = name.rpartition("-")
    return head if head and tail.isdigit() else name
