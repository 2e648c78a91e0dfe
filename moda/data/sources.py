"""From the ``data`` section to OLMo-core's datasets, checked before any training."""

from __future__ import annotations

import glob
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from olmo_core.data import (
    DataMix,
    NumpyDatasetDType,
    NumpyFSLDatasetConfig,
    NumpyPaddedFSLDatasetConfig,
)
from olmo_core.io import is_url

from moda.config.schema import DataConfig
from moda.errors import UserError, nearest

from .text import prepare_text
from .tokenizer import Tokenizer

__all__ = ["TrainingData", "build_training_data", "check_token_files", "token_dtype"]

log = logging.getLogger(__name__)

_CHECKED_TOKENS = 1 << 20  # token ids read from either end of a file when it is checked


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on.

    :param train: OLMo-core's dataset of fixed-length sequences.
    :param validation: OLMo-core's padded dataset, one label a set, or None.
    :param tokens: training tokens in one epoch, or None where the files are remote and were not asked.
    """

    train: NumpyFSLDatasetConfig
    validation: Optional[NumpyPaddedFSLDatasetConfig]
    tokens: Optional[int]


def token_dtype(vocab_size: int) -> NumpyDatasetDType:
    """The integer type of token files: uint16 where every id fits, uint32 otherwise."""
    return NumpyDatasetDType.uint16 if vocab_size <= 2**16 else NumpyDatasetDType.uint32


def _expand(key: str, patterns: List[str]) -> List[str]:
    paths: List[str] = []
    for pattern in patterns:
        if is_url(pattern):
            paths.append(pattern)
            continue
        matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not matches:
            raise UserError(key, "token files that exist", pattern, "scripts/prepare_data.py makes them from text")
        paths.extend(matches)
    return paths


def _manifest_of(path: Path) -> Optional[Tuple[Path, Dict[str, Any]]]:
    """The manifest that describes a token file: in its folder or the one above."""
    for folder in (path.parent, path.parent.parent):
        file = folder / "manifest.json"
        if file.is_file():
            try:
                return file, json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as e:
                raise UserError(str(file), "a readable manifest", hint=str(e)) from None
    return None


def check_token_files(key: str, paths: List[str], tokenizer: Tokenizer) -> int:
    """Check local token files against the tokenizer and return how many tokens they hold.

    A manifest beside them must name the same tokenizer. Ids at both ends of each file must be within its vocabulary.

    :raises UserError: naming the file and what is wrong with it.
    """
    dtype = np.dtype(token_dtype(tokenizer.config.vocab_size).as_np_dtype())
    total = 0
    for name in paths:
        if is_url(name):
            continue
        path = Path(name)
        if not path.is_file():
            raise UserError(key, "token files that exist", name)
        found = _manifest_of(path)
        if found is not None:
            file, manifest = found
            made_with = manifest.get("tokenizer", {})
            theirs = made_with.get("fingerprint")
            if theirs is not None and theirs != tokenizer.fingerprint:
                raise UserError(
                    "data.tokenizer",
                    f"the tokenizer that made {name}: {made_with.get('name')} ({theirs[:20]}, {file})",
                    f"{tokenizer.name} ({tokenizer.fingerprint[:20]})",
                )
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(
                key, f"{name} to hold whole {dtype} token ids", f"{size} bytes", "truncated, or another type?"
            )
        tokens = np.memmap(path, dtype=dtype, mode="r")
        for part in (tokens[:_CHECKED_TOKENS], tokens[-_CHECKED_TOKENS:]):
            largest = int(part.max())
            if largest >= tokenizer.config.vocab_size:
                raise UserError(
                    "data.tokenizer",
                    f"a tokenizer whose vocabulary has the token ids of {name} (up to {largest})",
                    f"{tokenizer.name} with {tokenizer.config.vocab_size} tokens",
                )
        total += len(tokens)
    return total


def _mix(key: str, name: str) -> DataMix:
    try:
        return DataMix(name)
    except ValueError:
        raise UserError(key, "a data mix of OLMo-core", name, nearest(name, [m.value for m in DataMix])) from None


def _mix_files(key: str, name: str, data: DataConfig, tokenizer: Tokenizer) -> Tuple[List[str], List[str]]:
    """Paths and labels of a mix under ``data.base_dir``; a local one must be complete."""
    if data.base_dir is None:
        raise UserError("data.base_dir", f"the folder or URL under which {name} lies", hint=f"needed by {key}")
    if tokenizer.hub is None:
        raise UserError(
            "data.tokenizer", f"a tokenizer that {name} exists for", tokenizer.name, "set data.tokenizer.hub"
        )
    try:
        paths, labels = _mix(key, name).build(data.base_dir, tokenizer.hub)
    except (ValueError, FileNotFoundError) as e:
        raise UserError(key, f"a mix that exists for tokenizer {tokenizer.hub}", name, str(e)) from None
    if not is_url(data.base_dir):
        missing = [p for p in paths if not Path(p).is_file()]
        if missing:
            raise UserError(
                "data.base_dir",
                f"the {len(paths)} files of {name}",
                f"{len(missing)} of them missing, the first {missing[0]}",
            )
    return [str(p) for p in paths], list(labels)


def build_training_data(data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> TrainingData:
    """Datasets for training and validation.

    :raises UserError: for data that is missing, damaged or made with another tokenizer.
    """
    config = tokenizer.config
    common: Dict[str, Any] = dict(
        tokenizer=config,
        sequence_length=sequence_length,
        work_dir=data.work_dir,
        dtype=token_dtype(config.vocab_size),
    )
    validation: Dict[str, List[str]] = {}
    tokens: Optional[int] = None
    if data.text is not None:
        assert data.validation is None or isinstance(data.validation, dict)
        text = prepare_text(data.text, tokenizer, validation_fraction=data.validation_fraction, work_dir=data.work_dir)
        paths = [str(p) for p in text.train.values()]
        labels = list(text.train)
        validation = {label: [str(path)] for label, path in text.validation.items()}
        tokens = check_token_files("data.text", paths, tokenizer)
    elif data.paths is not None:
        paths = _expand("data.paths", data.paths)
        labels = [Path(p).stem for p in paths]
        tokens = check_token_files("data.paths", paths, tokenizer)
    else:
        assert data.mix is not None
        paths, labels = _mix_files("data.mix", data.mix, data, tokenizer)
        if data.base_dir is not None and not is_url(data.base_dir):
            tokens = sum(Path(p).stat().st_size for p in paths) // np.dtype(common["dtype"].as_np_dtype()).itemsize
    train = NumpyFSLDatasetConfig(
        paths=paths,
        metadata=[{"label": label} for label in labels],
        generate_doc_lengths=data.document_masking,
        **common,
    )
    return TrainingData(train, _validation(data, tokenizer, validation, common), tokens)


def _validation(
    data: DataConfig, tokenizer: Tokenizer, sets: Dict[str, List[str]], common: Dict[str, Any]
) -> Optional[NumpyPaddedFSLDatasetConfig]:
    files: List[Tuple[str, str]] = []
    if isinstance(data.validation, str):
        paths, labels = _mix_files("data.validation", data.validation, data, tokenizer)
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
