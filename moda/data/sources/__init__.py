"""From the ``data`` section to OLMo-core's datasets, checked before any training.

A data source is a class in a file of its own and a line in ``SOURCES``.
"""

from dataclasses import dataclass, field
from typing import Any

from olmo_core.data import NumpyDatasetDType, NumpyFSLDatasetConfig, NumpyPaddedFSLDatasetConfig

from moda.config.schema import DataConfig
from moda.data.datasets import TrainingDatasetConfig
from moda.data.mixes import mix_files
from moda.data.mixture import Drawn
from moda.data.token_files import check_documents, check_token_files, find_token_files
from moda.data.tokenizer import Tokenizer
from moda.errors import UserError, nearest

from .base import DataSource, Request
from .mix import Mix
from .mixture import Mixture
from .paths import Paths
from .text import Text

__all__ = ["SOURCES", "TrainingData", "build_training_data", "preview"]

#: By the key of ``data`` that asks for them, or of ``data.source``.
SOURCES: dict[str, DataSource] = {s.name: s for s in (Mix(), Paths(), Mixture(), Text())}


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    :param train: OLMo-core's dataset of fixed-length sequences.
    :param validation: OLMo-core's padded dataset, one label per set, or None.
    :param tokens: training tokens in one epoch, or None where the files are remote and were not asked.
    :param drawn: what comes from where.
    :param labels: the source of every path of ``train``.
    """

    train: NumpyFSLDatasetConfig
    validation: NumpyPaddedFSLDatasetConfig | None
    tokens: int | None
    drawn: list[Drawn] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def source_of(data: DataConfig) -> DataSource:
    """The source that a ``data`` section asks for.

    :raises UserError: if it asks for one that is not known, or for one with a key of its own under ``data.source``.
    """
    if data.source is not None:
        [name] = data.source
        if name in SOURCES and hasattr(data, name):
            raise UserError("data.source", "a data source without a key of its own", name, f"write data.{name}")
        if name not in SOURCES:
            raise UserError("data.source", "a known data source", name, nearest(name, SOURCES))
        return SOURCES[name]
    return next(source for name, source in SOURCES.items() if getattr(data, name, None) is not None)


def preview(
    data: DataConfig, tokenizer: Tokenizer, sequence_length: int, total_tokens: int, tokens_per_step: int
) -> list[Drawn]:
    """What a run would draw from where, without writing anything but caches; empty for text that is not tokenized yet.

    :raises UserError: for data that is missing, damaged or too little.
    """
    return source_of(data).preview(Request(data, tokenizer, sequence_length, total_tokens, tokens_per_step))


def build_training_data(
    data: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    total_tokens: int | None = None,
    tokens_per_step: int | None = None,
) -> TrainingData:
    """Datasets for training and validation.

    :param total_tokens: what the run trains on; needed by mixtures.
    :param tokens_per_step: tokens of a batch; needed by mixtures.

    :raises UserError: for data that is missing, damaged or made with another tokenizer.
    """
    request = Request(data, tokenizer, sequence_length, total_tokens, tokens_per_step)
    selected = source_of(data).select(request)
    common: dict[str, Any] = dict(
        tokenizer=tokenizer.config,
        sequence_length=sequence_length,
        work_dir=data.work_dir,
        dtype=NumpyDatasetDType(request.dtype.name),
    )
    train = TrainingDatasetConfig(
        paths=selected.paths or None,
        drawn=selected.mixed,
        seed=data.mixture.seed if data.mixture is not None else 0,
        metadata=[{"label": label} for label in selected.labels],
        generate_doc_lengths=data.document_masking,
        **common,
    )
    counts = [d.tokens for d in selected.drawn]
    tokens = None if None in counts else sum(n or 0 for n in counts)
    validation = _validation(request, selected.validation, common)
    return TrainingData(train, validation, tokens, selected.drawn, selected.labels)


def _validation(
    request: Request, sets: dict[str, list[str]], common: dict[str, Any]
) -> NumpyPaddedFSLDatasetConfig | None:
    """The sets that ``data.validation`` names, else those that the source held out."""
    given = request.data.validation
    files: list[tuple[str, str]] = []
    if isinstance(given, str):
        paths, labels = mix_files("data.validation", given, request.data, request.tokenizer, request.dtype.itemsize)
        files = list(zip(labels, paths))
    elif given is not None:
        sets = {name: find_token_files(f"data.validation.{name}", patterns) for name, patterns in given.items()}
    for label, paths in sets.items():
        check_token_files(f"data.validation.{label}", paths, request.tokenizer)
        check_documents(f"data.validation.{label}", paths, request.tokenizer)
        files += [(label, path) for path in paths]
    if not files:
        return None
    metadata = [{"label": label} for label, _ in files]
    return NumpyPaddedFSLDatasetConfig(paths=[path for _, path in files], metadata=metadata, **common)
