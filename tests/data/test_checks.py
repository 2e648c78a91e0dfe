"""Shards held against their manifest at the start of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moda.config.schema import DataConfig, TokenizerSection, Verify
from moda.data import build_training_data, load_tokenizer
from moda.data.token_files import check_token_files
from moda.errors import UserError
from tests.data_files import write_jsonl


@pytest.fixture
def folder(tmp_path: Path, documents: list[str], prepared: Any) -> Path:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    return prepared(tmp_path / "out", {"a": str(path)}, shard_tokens=3000, validation_fraction=0.1).folder


def check(folder: Path, work: Path, verify: str = "size") -> Any:
    data = DataConfig(
        paths=[f"{folder}/train/*.npy"], tokenizer="gpt-neox", verify=Verify(verify), work_dir=str(work),
        validation={"a": [f"{folder}/validation/*.npy"]},
    )  # fmt: skip
    return build_training_data(data, load_tokenizer(TokenizerSection("gpt-neox")), 64)


@pytest.mark.parametrize("verify", ["size", "hash"])
def test_whole_shards(folder: Path, tmp_path: Path, verify: str) -> None:
    found = check(folder, tmp_path / "work", verify)
    assert found.tokens == sum(p.stat().st_size // 2 for p in (folder / "train").iterdir())
    assert [d.name for d in found.drawn] == ["a"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_truncated_shard_is_named(folder: Path, tmp_path: Path, cached: bool) -> None:
    if cached:
        check(folder, tmp_path / "work")
    shard = folder / "train" / "a-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a-00001\.npy with the \d+ bytes.*cut short"):
        check(folder, tmp_path / "work")


def test_a_changed_shard_is_found_by_its_hash(folder: Path, tmp_path: Path) -> None:
    shard = folder / "train" / "a-00001.npy"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(bytes(data))
    check(folder, tmp_path / "work")
    with pytest.raises(UserError, match=r"a-00001\.npy as it was prepared"):
        check(folder, tmp_path / "work", "hash")


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "a-00001.npy").unlink()
    with pytest.raises(UserError, match=r"no .*a-00001\.npy"):
        check(folder, tmp_path / "work")


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(paths=[f"{folder}/train/*.npy"], tokenizer="gpt2", work_dir=str(tmp_path / "work"))
    with pytest.raises(UserError, match=r"data\.tokenizer.*gpt-neox.*gpt2"):
        build_training_data(data, load_tokenizer(TokenizerSection("gpt2")), 64)


def test_many_shards_are_checked_quickly(tmp_path: Path) -> None:
    paths = []
    for i in range(1000):
        path = tmp_path / f"{i:05d}.npy"
        with path.open("wb") as f:
            os.truncate(f.fileno(), 100_000_000)
        paths.append(str(path))
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox"))
    began = time.process_time()
    first = check_token_files("data.paths", paths, tokenizer, cache=tmp_path / "work")
    middle = time.process_time()
    again = check_token_files("data.paths", paths, tokenizer, cache=tmp_path / "work")
    assert first == again == 1000 * 50_000_000
    assert time.process_time() - middle < middle - began < 5
    np.full(50_000_000 // 1000, 60_000, dtype=np.uint16).tofile(paths[500])
    with pytest.raises(UserError, match=r"00500\.npy \(up to 60000\)"):
        check_token_files("data.paths", paths, tokenizer, cache=tmp_path / "work")
