"""The benchmark of training steps: the models are those of configs/, and rows come out of tiny ones on a CPU."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest

from moda.bench import loss
from moda.bench.memory import CASES, peak_of
from moda.bench.training import MODELS, training_table
from moda.config import load_config
from moda.errors import UserError
from moda.model import transformer_config
from tests.tiny import ROOT, write_config


def test_the_models_are_those_that_were_measured() -> None:
    with (ROOT / "docs" / "benchmarks" / "table_training.csv").open(newline="") as f:
        measured = {row["model"]: int(row["params"]) for row in csv.DictReader(f)}
    built = {
        name: transformer_config(load_config(ROOT / "configs" / file, overrides).model)
        for name, (file, overrides, _) in MODELS.items()
    }
    assert set(built) - set(measured) <= {"the same, fp8 slots"}, "the one that has not been measured yet"
    assert {name: built[name].num_params for name in measured} == measured
    assert [model.n_layers for model in built.values()] == [38, 38, 36, 36]
    fp8 = built["the same, fp8 slots"].model.depth
    assert fp8 is not None and fp8.layout(36).quantised  # type: ignore[union-attr]


def test_rows_of_tiny_models(tmp_path: Path) -> None:
    config = write_config(tmp_path).read_text()
    for file, _, _ in MODELS.values():
        (tmp_path / file).write_text(config)
    rows = training_table(tmp_path, rounds=1, batch=1, length=16, steps=2, warmup=1, compiled=False)
    assert [row["model"] for row in rows] == list(MODELS) and rows[0]["over_baseline"] == 1.0
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["params"] > 0
        assert row["tokens_per_second"] == pytest.approx(16e3 / row["median_ms"], rel=0.01)


def test_an_installed_project_without_configs_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--configs: expected a folder with olmo2_700m.yaml"):
        training_table(tmp_path)


def test_a_row_of_memory(tmp_path: Path) -> None:
    row = peak_of(write_config(tmp_path), ["train.microbatch_size=2", "model.n_layers=2"], steps=2)
    assert row["status"] == "ok" and row["microbatch"] == 2 and row["step_ms"] > 0 and "parameters" in row["parts_gib"]
    for case in CASES:
        file, *overrides = shlex.split(case)
        load_config(ROOT / "configs" / file, overrides)


def test_rows_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"logits, compiled": (loss._from_logits, True)} | {
        n: loss.VARIANTS[n] for n in ("moda", "torch", "liger")
    }
    monkeypatch.setattr(loss, "VARIANTS", {**variants, "wrong": (lambda *a: 1.1 * loss._from_logits(*a), True)})
    rows = {row["variant"]: row for row in loss.loss_table(40, 50, 64, 16, device="cpu", checked=20, repeats=2)}
    assert rows["moda"]["status"] == "ok" and rows["moda"]["median_ms"] > 0
    assert rows["wrong"]["status"] == "parity failed" and rows["wrong"]["median_ms"] == ""
    assert rows["liger"]["status"] == "ok" or rows["liger"]["status"].startswith(("not here: ", "failed: "))
