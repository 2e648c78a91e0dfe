"""From the ``data`` section to OLMo-core's datasets, checked before any training."""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.data import (
    NumpyFSLDatasetConfig,
    NumpyPaddedFSLDatasetConfig,
)
from olmo_core.io import is_url

from moda.config.schema import DataConfig
from moda.errors import UserError

from .checks import check_token_files, missing_shards, token_dtype
from .mixes import mix_files
from .mixture import Drawn, MixtureDatasetConfig, draw, label_of, stem
from .text import prepare_text
from .tokenizer import Tokenizer

__all__ = ["TrainingData", "build_training_data", "check_token_files", "preview", "token_dtype"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    :param train: OLMo-core's dataset of fixed-length sequences.
    :param validation: OLMo-core's padded dataset, one label a set, or None.
    :param tokens: training tokens in one epoch, or None where the files are remote and were not asked.
    :param drawn: what comes from where.
    :param labels: the source of every path of ``train``.
    """

    train: NumpyFSLDatasetConfig
    validation: NumpyPaddedFSLDatasetConfig | None
    tokens: int | None
    drawn: list[Drawn] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def _expand(key: str, patterns: list[str]) -> list[str]:
    paths: list[str] = []
    for pattern in patterns:
        if is_url(pattern):
            paths.append(pattern)
            continue
        matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not matches:
            raise UserError(key, "token files that exist", pattern, "scripts/prepare_data.py makes them from text")
        missing = missing_shards(pattern)
        if missing:
            raise UserError(key, f"all shards that the manifest lists under {pattern}", f"no {missing[0]}")
        paths.extend(matches)
    return paths


def _by_label(paths: list[str], labels: list[str], width: int) -> list[Drawn]:
    """Files and tokens of each label, all of which is drawn; tokens are None where a file is remote."""
    found: dict[str, tuple[int, int | None]] = {}
    for path, label in zip(paths, labels):
        files, tokens = found.get(label, (0, 0))
        here = None if is_url(path) else Path(path).stat().st_size // width
        found[label] = (files + 1, None if tokens is None or here is None else tokens + here)
    return [Drawn(label, files, tokens, tokens) for label, (files, tokens) in found.items()]


def _mixture(
    data: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    total_tokens: int | None,
    tokens_per_step: int | None,
) -> tuple[Any, list[Drawn]]:
    assert data.mixture is not None
    if total_tokens is None or tokens_per_step is None:
        raise ValueError("a mixture needs the run's total tokens and tokens per step")
    files: dict[str, list[str]] = {}
    for name, source in data.mixture.sources.items():
        key = f"data.mixture.sources.{name}.paths"
        files[name] = _expand(key, source.paths)
        check_token_files(key, files[name], tokenizer, verify=data.verify, cache=data.work_dir)
    return draw(
        data.mixture, files, total_tokens=total_tokens, tokens_per_step=tokens_per_step,
        sequence_length=sequence_length, dtype=token_dtype(tokenizer.config.vocab_size).as_np_dtype(),
    )  # fmt: skip


def preview(
    data: DataConfig, tokenizer: Tokenizer, sequence_length: int, total_tokens: int, tokens_per_step: int
) -> list[Drawn]:
    """What a run would draw from where, without writing anything but caches; empty for text that is not tokenized yet.

    :raises UserError: for data that is missing, damaged or too little.
    """
    if data.text is not None:
        return []
    if data.mixture is not None:
        return _mixture(data, tokenizer, sequence_length, total_tokens, tokens_per_step)[1]
    width = np.dtype(token_dtype(tokenizer.config.vocab_size).as_np_dtype()).itemsize
    if data.paths is not None:
        paths = _expand("data.paths", data.paths)
        check_token_files("data.paths", paths, tokenizer, verify=data.verify, cache=data.work_dir)
        return _by_label(paths, [stem(p) for p in paths], width)
    assert data.mix is not None
    return _by_label(*mix_files("data.mix", data.mix, data, tokenizer, width), width)


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
    config = tokenizer.config
    common: dict[str, Any] = dict(
        tokenizer=config,
        sequence_length=sequence_length,
        work_dir=data.work_dir,
        dtype=token_dtype(config.vocab_size),
    )
    width = np.dtype(common["dtype"].as_np_dtype()).itemsize
    validation: dict[str, list[str]] = {}
    tokens: int | None = None
    if data.mixture is not None:
        mixed, drawn = _mixture(data, tokenizer, sequence_length, total_tokens, tokens_per_step)
        labels = label_of(mixed)
        train: NumpyFSLDatasetConfig = MixtureDatasetConfig(
            drawn=mixed,
            seed=data.mixture.seed,
            metadata=[{"label": label} for label in labels],
            generate_doc_lengths=data.document_masking,
            **common,
        )
        tokens = sum(d.tokens or 0 for d in drawn)
        return TrainingData(train, _validation(data, tokenizer, {}, common, width), tokens, drawn, labels)
    if data.text is not None:
        assert data.validation is None or isinstance(data.validation, dict)
        text = prepare_text(data.text, tokenizer, validation_fraction=data.validation_fraction, work_dir=data.work_dir)
        paths = [str(p) for p in text.train.values()]
        labels = list(text.train)
        validation = {label: [str(path)] for label, path in text.validation.items()}
        tokens = check_token_files("data.text", paths, tokenizer)
    elif data.paths is not None:
        paths = _expand("data.paths", data.paths)
        labels = [stem(p) for p in paths]
        tokens = check_token_files("data.paths", paths, tokenizer, verify=data.verify, cache=data.work_dir)
    else:
        assert data.mix is not None
        paths, labels = mix_files("data.mix", data.mix, data, tokenizer, width)
        if data.base_dir is not None and not is_url(data.base_dir):
            tokens = check_token_files("data.mix", paths, tokenizer, verify=data.verify, cache=data.work_dir)
    train = NumpyFSLDatasetConfig(
        paths=paths,
        metadata=[{"label": label} for label in labels],
        generate_doc_lengths=data.document_masking,
        **common,
    )
    found = _validation(data, tokenizer, validation, common, width)
    return TrainingData(train, found, tokens, _by_label(paths, labels, width), labels)


def _validation(
    data: DataConfig, tokenizer: Tokenizer, sets: dict[str, list[str]], common: dict[str, Any], width: int
) -> NumpyPaddedFSLDatasetConfig | None:
    files: list[tuple[str, str]] = []
    if isinstance(data.validation, str):
        paths, labels = mix_files("data.validation", data.validation, data, tokenizer, width)
        files = list(zip(labels, paths))
    elif data.validation is not None:
        sets = {name: _expand(f"data.validation.{name}", patterns) for name, patterns in data.validation.items()}
    for label, paths in sets.items():
        check_token_files(f"data.validation.{label}", paths, tokenizer)
        files += [(label, path) for path in paths]
    if not files:
        return None
    return NumpyPaddedFSLDatasetConfig(
        paths=[path for _, path in files], metadata=[{"label": label} for label, _ in files], **common
    )
