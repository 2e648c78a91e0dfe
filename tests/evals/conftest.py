"""Fixtures of the evaluation tests: a tokenizer, a checkpoint, a model."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import tokenizers

from tests.small_checkpoint import run_config, save_checkpoint


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 600 tokens."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tok.save(str(path))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "step10"
    save_checkpoint(folder, run_config(tokenizer_file))
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path):
    from moda_evals.model import load

    return load(str(checkpoint))
