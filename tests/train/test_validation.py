"""Validation in the loop: every set by itself and whole, the same figures whatever the batches and ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from olmo_core.data import DataCollator, NumpyPaddedFSLDataset
from olmo_core.data.utils import get_labels

from moda.train import metrics
from moda.train.validation import NextTokenEvaluator, ValidationBatches
from tests.tiny import run, write_config

LENGTH, EOS, PAD = 16, 1, 0
SETS = {"a": 13, "b": 2, "c": 5}


@pytest.fixture
def dataset(tmp_path: Path) -> NumpyPaddedFSLDataset:
    """Three sets of documents of 3 to 12 tokens; set a has two files."""
    rng = np.random.default_rng(0)
    paths, labels = [], []
    for label, count in SETS.items():
        for part in np.array_split(np.arange(count), 2 if label == "a" else 1):
            documents = [[*rng.integers(2, 50, rng.integers(2, 12)), EOS] for _ in part]
            paths.append(tmp_path / f"{label}{len(paths)}.npy")
            np.asarray(sum(documents, []), dtype=np.uint16).tofile(paths[-1])
            labels.append({"label": label})
    made = NumpyPaddedFSLDataset(
        *map(str, paths), sequence_length=LENGTH, pad_token_id=PAD, eos_token_id=EOS, vocab_size=50, metadata=labels,
        include_instance_metadata=True,
    )  # fmt: skip
    made.work_dir = tmp_path / "work"
    made.prepare()
    return made


def batches(
    dataset: NumpyPaddedFSLDataset, per_rank: int, rank: int = 0, ranks: int = 1, limit=None
) -> ValidationBatches:
    return ValidationBatches(
        dataset, DataCollator(pad_token_id=PAD), per_rank=per_rank, rank=rank, ranks=ranks, limit=limit
    )


def means(found: list[ValidationBatches]) -> dict[str, float]:
    """What the evaluator makes of it when the loss of predicting a token is its id, and where nothing is predicted 0."""
    evaluator = NextTokenEvaluator(name="lm", batches=[], labels=list(SETS), device=torch.device("cpu"))
    for of_rank in found:
        for batch in of_rank:
            evaluator.update_metrics(batch, get_labels(batch).float().clamp(min=0), None)
    return {k.split("/")[0]: v.item() for k, v in evaluator.compute_metrics().items() if k.endswith("CE loss")}


def test_every_document_counts_once_for_any_batch_and_ranks(dataset: NumpyPaddedFSLDataset) -> None:
    truth = {}
    for label in SETS:
        ids = [np.fromfile(p, dtype=np.uint16) for p, m in zip(dataset.paths, dataset.metadata) if m["label"] == label]
        flat = np.concatenate(ids)
        first = np.concatenate([[True], flat[:-1] == EOS])  # of a document: not predicted
        truth[label] = flat[~first].mean()
    for per_rank, ranks in ((1, 1), (4, 1), (64, 1), (3, 4), (8, 2)):
        parts = [batches(dataset, per_rank, rank, ranks) for rank in range(ranks)]
        assert len({len(p) for p in parts}) == 1, "every rank runs equally often"
        assert all(len(b["input_ids"]) == per_rank for p in parts for b in p)
        assert means(parts) == pytest.approx(truth, rel=1e-5)


def test_a_limit_is_one_of_each_set(dataset: NumpyPaddedFSLDataset) -> None:
    limited = batches(dataset, 2, limit=2)
    labels = [m["label"] for b in limited for m in b["metadata"]]
    counted = [bool(mask.any()) for b in limited for mask in b["label_mask"]]
    assert [sum(c for x, c in zip(labels, counted) if x == label) for label in SETS] == [4, 2, 4]
    assert all(math.isfinite(mean) for mean in means([batches(dataset, 1, limit=1)]).values())


def test_a_run_evaluates_every_set_and_the_last_step_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, eval=dict(interval=2, on_start=True, on_finish=True, max_batches=1))
    done = run(config, "train.max_steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
    evaluated = [x["step"] for x in lines if any(k.startswith("eval/") for k in x)]
    assert evaluated == [0, 2, 4]
    assert all(v is not None for x in lines for k, v in x.items() if k.startswith("eval/"))
    assert (done.stdout + done.stderr).count("step 4 | eval/") == 1
