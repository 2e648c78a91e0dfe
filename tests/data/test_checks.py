"""Shards checked against their manifest at the start of a run."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moda.config.schema import DataConfig, TokenizerSection, Verify
from moda.data import build_training_data, load_tokenizer
from moda.data.token_files import check_documents, check_token_files
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


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: np.save(p.open("wb"), np.arange(1, 99, dtype=np.uint16)), "np.save"),
        (lambda p: np.arange(1, 99).astype(np.int64).tofile(p), "8-byte numbers"),
        (lambda p: np.arange(1, 99).astype(np.int32).tofile(p), "4-byte numbers"),
        (lambda p: np.arange(1, 99).astype(">i4").tofile(p), "4-byte numbers"),
        (lambda p: np.arange(1, 99).astype(np.float32).tofile(p), "4-byte numbers"),
        (lambda p: np.savez(p.open("wb"), np.arange(1, 99)), "np.savez"),
        (lambda p: p.write_bytes(b"Plain text, once upon a time.\n" * 8), "text"),
        (lambda p: p.write_bytes(b"\1\0\2\0\3"), "whole uint16 token ids"),
    ],
)
def test_files_of_another_type_are_refused(write: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        check_token_files("data.paths", [str(path)], load_tokenizer(TokenizerSection("gpt-neox")))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("eos_at", [None, 0, 2**20 + 1])
def test_files_without_documents_are_named(eos_at: int | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox"))
    ids = np.full(2**20 + 2, 7, dtype=np.uint16)
    if eos_at is not None:
        ids[eos_at] = tokenizer.config.eos_token_id
    ids.tofile(path := tmp_path / "a.npy")
    with contextlib.nullcontext() if eos_at is not None else pytest.raises(UserError, match=f"eos.*none in {path}"):
        check_documents("data.validation.a", [str(path)], tokenizer)


def test_int64_ids_are_not_read_as_uint32(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.arange(1, 99).astype(np.int64).tofile(path)
    with pytest.raises(UserError, match="8-byte numbers.*uint32"):
        check_token_files("data.paths", [str(path)], load_tokenizer(TokenizerSection("dolma2")))


@pytest.mark.parametrize("ids", [np.zeros(100), np.arange(100), np.tile([7, 0, 9], 40), np.tile([5, 0, 6, 8], 40)])
def test_flat_ids_are_not_taken_for_another_type(ids: np.ndarray, tmp_path: Path) -> None:
    ids.astype(np.uint16).tofile(tmp_path / "a.npy")
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox"))
    assert check_token_files("data.paths", [str(tmp_path / "a.npy")], tokenizer) == len(ids)


def test_an_id_beyond_the_vocabulary_inside_a_file_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    path, tokenizer = tmp_path / "a.npy", load_tokenizer(TokenizerSection("gpt-neox"))
    ids = np.full(100_000, 5, dtype=np.uint16)
    ids[50_001] = 60_000
    ids.tofile(path)
    data = DataConfig(paths=[str(path)], tokenizer="gpt-neox", work_dir=str(tmp_path / "work"))
    with pytest.raises(UserError, match=r"a\.npy \(up to 60000\)"):
        build_training_data(data, tokenizer, 64)
    monkeypatch.setattr("moda.data.token_files._READ_WHOLE", 1000)  # too much to be read whole: noticed as it is read
    dataset = build_training_data(data, tokenizer, 64).train.build()
    dataset.prepare()
    with pytest.raises(UserError, match=r"below \d+ in .*a\.npy, got 60000"):
        dataset[50_001 // 64]


def test_damaged_manifests(folder: Path, tmp_path: Path) -> None:
    for content in ("[]", "{", '{"shards": []}', '{"shards": {"train/a-00000.npy": {}}}', "[" * 100_000):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            check(folder, tmp_path / "work")


@pytest.mark.parametrize(
    ("name", "message"), [("paths", "write data.paths"), ("mix", "write data.mix"), ("pathz", "did you mean 'paths'")]
)
def test_data_source_by_a_wrong_name(name: str, message: str, tmp_path: Path) -> None:
    data = DataConfig(source={name: {}}, tokenizer="gpt-neox", work_dir=str(tmp_path))
    with pytest.raises(UserError, match=message):
        build_training_data(data, load_tokenizer(TokenizerSection("gpt-neox")), 16)
