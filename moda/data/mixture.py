"""Several sources in given shares.

OLMo-core's source mixture decides how many sequences come from each file: shares of the sources by ratio, files of a source in
proportion to their size, rounding by largest remainder.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from olmo_core.data.source_mixture import (
    SourceMixtureConfig,
    SourceMixtureDataset,
    SourceMixtureDatasetConfig,
    SourceMixtureList,
)
from olmo_core.io import get_file_size

from moda.config.schema import MixtureSection
from moda.errors import UserError


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


def draw(
    mixture: MixtureSection, files: dict[str, list[str]], *, total_tokens: int, tokens_per_step: int,
    sequence_length: int, dtype: np.dtype,
) -> tuple[SourceMixtureDataset, list[Drawn]]:  # fmt: skip
    """Decide how many tokens come from which file.

    :param files: the sources' token files.
    :param total_tokens: what the run trains on.
    :param dtype: of the token files.

    :raises UserError: naming the source that is too small, and by how much.
    """
    available = {
        n: sum(get_file_size(p) // dtype.itemsize // sequence_length for p in paths) * sequence_length
        for n, paths in files.items()
    }
    budget = sum(s.tokens or 0 for s in mixture.sources.values())
    if budget and budget < total_tokens:
        expected = f"budgets of at least the run's {total_tokens:,} tokens"
        raise UserError("data.mixture", expected, f"{budget:,}", "or shorten train.max_tokens")
    weights = {n: float(s.ratio if s.ratio is not None else s.tokens or 0) for n, s in mixture.sources.items()}
    parts = {n: weight / sum(weights.values()) for n, weight in weights.items()}  # of the whole
    for name, source in mixture.sources.items():
        need, most = int(total_tokens * parts[name]), int(available[name] * source.max_repetition)
        if need > most:
            times = f"{need / available[name]:.2f}" if available[name] else "any number of"
            expected = f"{need:,} tokens ({parts[name]:.1%} of the run)"
            got = f"{available[name]:,} x max_repetition {source.max_repetition:g}"
            hint = f"{times} times through it: lower its share, shorten the run, or raise its max_repetition"
            raise UserError(f"data.mixture.sources.{name}", expected, got, hint)
    sources = [  # OLMo-core truncates; a source that is used up exactly must not fail for that
        SourceMixtureConfig(name, parts[name], list(files[name]), max_repetition_ratio=source.max_repetition + 1e-6)
        for name, source in mixture.sources.items()
    ]
    config = SourceMixtureDatasetConfig(
        SourceMixtureList(sources), requested_tokens=total_tokens, global_batch_size=tokens_per_step, processes=8,
        seed=mixture.seed, render_tables=False, quiet=True,
    )  # fmt: skip
    logger = logging.getLogger("olmo_core.data.source_mixture")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it logs a line per file
    try:
        drawn = config.build(npdtype=dtype.type, sequence_length=sequence_length)
    finally:
        logger.setLevel(level)
    drawn.filter_zero_token_paths = True
    summary = []
    for outcome in drawn.sources:
        tokens = [p.tokens for p in outcome.path_tokens if p.tokens]
        used = len({p.path for p in outcome.path_tokens if p.tokens})
        summary.append(Drawn(outcome.name, used, available[outcome.name], sum(tokens)))
    return drawn, summary


def labels_of(drawn: SourceMixtureDataset) -> list[str]:
    """The source of every path of the dataset, in order."""
    return [o.name for o in drawn.sources for p in o.path_tokens if p.tokens > 0]
