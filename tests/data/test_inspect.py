"""The look at prepared data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moda.data.inspect import Lengths, inspect, scan
from moda.errors import UserError
from tests.data_files import write_jsonl


def test_prepared_folder(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "b.jsonl", documents[:20])
    done = prepared(tmp_path / "out", {"a": str(a), "b": str(b)}, validation_fraction=0.2, shard_tokens=2000)
    out = io.StringIO()
    plot = tmp_path / "lengths.png"
    found = inspect([str(done.folder)], Console(file=out, width=200), samples=2, plot=str(plot))
    for name in ("a", "b"):
        train, held_out = done.manifest["sources"][name]["train"], found[name]
        assert (held_out.documents, held_out.tokens) == (train["documents"], train["tokens"])
        assert int(held_out.buckets.sum()) == train["documents"] and held_out.unfinished == 0
    assert "a (validation)" in found
    shown = out.getvalue()
    assert "document " in shown and "#" in shown and "naïve" in shown  # a sample, a histogram, decoded text
    assert plot.stat().st_size > 5000
    with pytest.raises(UserError, match="--plot"):
        inspect([str(done.folder)], Console(quiet=True), samples=0, plot=str(tmp_path / "no" / "folder.png"))


def test_lengths_across_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("moda.data.inspect._BLOCK", 7)
    lengths = [1, 2, 3, 20, 9, 1]
    ids = np.concatenate([np.r_[np.full(n - 1, 5), 0] for n in lengths] + [np.full(4, 5)]).astype(np.uint16)
    ids.tofile(tmp_path / "t.npy")
    found = Lengths()
    scan(tmp_path / "t.npy", np.uint16, 0, found)
    assert (found.documents, found.tokens, found.longest, found.unfinished) == (6, 40, 20, 4)
    assert found.buckets[:6].tolist() == [2, 1, 1, 0, 1, 1]


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest.json"):
        inspect([str(tmp_path)], Console(quiet=True))
    with pytest.raises(UserError, match="prepared folder or a token file"):
        inspect([str(tmp_path / "nothing")], Console(quiet=True))
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "t.npy")
    with pytest.raises(UserError, match="--tokenizer"):
        inspect([str(tmp_path / "t.npy")], Console(quiet=True))
    for size in (0, 3):
        (tmp_path / "t.npy").write_bytes(b"\1" * size)
        with pytest.raises(UserError, match=f"whole uint16 token ids.*{size} bytes"):
            inspect([str(tmp_path / "t.npy")], Console(quiet=True), tokenizer="gpt-neox")
