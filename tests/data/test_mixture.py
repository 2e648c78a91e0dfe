"""Mixtures: shares, seeds, limits, and a record of what was really drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moda.config import load_config
from moda.config.schema import DataConfig, MixtureSection, MixtureSource
from moda.data import build_training_data, load_tokenizer
from moda.data.datasets import affine
from moda.errors import UserError
from tests.tiny import make_tokenizer, tiny_config

LENGTH, STEP = 16, 64  # tokens of a sequence and of a batch


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[str]]:
    """Two sources of several files; every sequence of 16 tokens repeats one number that tells file and place."""
    made: dict[str, list[str]] = {}
    for name, base, files in (("big", 0, 3), ("small", 200, 2)):
        made[name] = []
        for i in range(files):
            sequences = 40 if name == "big" else 10
            ids = np.repeat(np.arange(sequences) + base + i * sequences, LENGTH).astype(np.uint16)
            path = tmp_path / f"{name}-{i:05d}.npy"
            np.concatenate([ids, ids[:5]]).tofile(path)  # a tail that fills no sequence
            made[name].append(str(path))
    return made


def build(tmp_path: Path, sources: dict[str, list[str]], total: int, seed: int = 0, **weights: Any) -> Any:
    made = {n: MixtureSource(paths, **weights[n]) for n, paths in sources.items()}
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    data = DataConfig(mixture=MixtureSection(made, seed), tokenizer=str(tokenizer), work_dir=str(tmp_path / "work"))
    loaded = load_tokenizer(data.tokenizer)  # type: ignore[arg-type]
    return build_training_data(data, loaded, LENGTH, total_tokens=total, tokens_per_step=STEP)


def contents(data: Any) -> list[int]:
    dataset = data.train.build()
    dataset.prepare()
    items = [dataset[i]["input_ids"] for i in range(len(dataset))]
    assert all(len(set(ids.tolist())) == 1 for ids in items)
    return [int(ids[0]) for ids in items]


def test_shares(tmp_path: Path, sources: dict[str, list[str]]) -> None:
    data = build(tmp_path, sources, 64 * LENGTH, big={"ratio": 3}, small={"ratio": 1})
    found = contents(data)
    assert len(found) == 64 and len(set(found)) == 64  # no sequence twice
    assert abs(sum(f >= 200 for f in found) - 16) <= 1
    assert {d.name: d.available for d in data.drawn} == {"big": 120 * LENGTH, "small": 20 * LENGTH}
    assert sum(d.tokens for d in data.drawn) == 64 * LENGTH == data.tokens


def test_seeds_choose_other_sequences(tmp_path: Path, sources: dict[str, list[str]]) -> None:
    weights: dict[str, Any] = {"big": {"ratio": 3}, "small": {"ratio": 1}}
    first, again = (contents(build(tmp_path, sources, 32 * LENGTH, 0, **weights)) for _ in range(2))
    other = build(tmp_path, sources, 32 * LENGTH, 1, **weights)
    assert first == again
    assert set(first) != set(contents(other)) and len(set(contents(other))) == 32
    assert (
        build(tmp_path, sources, 32 * LENGTH, 0, **weights).train.build().fingerprint != other.train.build().fingerprint
    )


def test_repetition(tmp_path: Path, sources: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match=r"sources\.small.*1\.60 times through it.*max_repetition"):
        build(tmp_path, sources, 64 * LENGTH, big={"ratio": 1}, small={"ratio": 1})
    data = build(tmp_path, sources, 64 * LENGTH, big={"ratio": 1}, small={"ratio": 1, "max_repetition": 2})
    times = Counter(f for f in contents(data) if f >= 200)
    assert len(times) == 20 and set(times.values()) == {1, 2}
    assert abs(sum(times.values()) - 32) <= 2


def test_budgets(tmp_path: Path, sources: dict[str, list[str]]) -> None:
    data = build(tmp_path, sources, 64 * LENGTH, big={"tokens": 56 * LENGTH}, small={"tokens": 8 * LENGTH})
    assert {d.name: d.tokens for d in data.drawn} == {"big": 56 * LENGTH, "small": 8 * LENGTH}
    with pytest.raises(UserError, match="budgets of at least the run's"):
        build(tmp_path, sources, 64 * LENGTH, big={"tokens": 10 * LENGTH}, small={"tokens": 8 * LENGTH})
    with pytest.raises(UserError, match="ratios for all sources or tokens for all"):
        build(tmp_path, sources, 64, big={"tokens": 10}, small={"ratio": 1})


@pytest.mark.parametrize("count", [1, 2, 7, 12, 97, 1000])
def test_order_is_a_permutation(count: int) -> None:
    for seed in range(3):
        step, offset = affine(count, seed, 1)
        assert sorted((i * step + offset) % count for i in range(count)) == list(range(count))


def test_a_run_records_what_it_drew(tmp_path: Path, sources: dict[str, list[str]], capsys: Any) -> None:
    from moda.train.run import plan, print_plan, train

    make_tokenizer(tmp_path / "tokenizer.json")
    config = tiny_config(tmp_path)
    mixture = {"sources": {n: {"paths": p, "ratio": r} for (n, p), r in zip(sources.items(), (3, 1))}, "seed": 3}
    config["data"].pop("text")
    config["data"].pop("validation_fraction")
    config["data"]["mixture"] = mixture
    config["train"].update(sequence_length=LENGTH, global_batch_size=4, microbatch_size=4, max_steps=10)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    loaded = load_config(file)
    print_plan(plan(loaded))
    shown = capsys.readouterr().out
    assert "small" in shown and "times through" in shown
    assert train(loaded).steps == 10
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    planned = {d["source"]: d["drawn_tokens"] for d in record["dataset"]}
    drawn = {name: s["tokens"] for name, s in record["trained_on"]["sources"].items()}
    assert drawn == planned and sum(drawn.values()) == 10 * 4 * LENGTH
