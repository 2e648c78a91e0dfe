"""A new task or document set is an instance of its class and one line in the registry, and is then known everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moda.config.schema import RunConfig
from moda.errors import UserError
from moda.typed import from_dict
from moda_evals.in_loop import check_downstream
from moda_evals.model import ModelInfo
from moda_evals.report import markdown
from moda_evals.run import Options, evaluate
from moda_evals.sets import SETS, DocumentSet, OpenSet, TokenDocument
from moda_evals.tasks import TASKS, JsonlTask, Task, resolve_tasks
from tests.tiny import tiny_config

QUESTIONS: list[dict[str, Any]] = [
    {"context": "The capital of France is", "choices": [" Paris", " Rome", " a very large town"], "label": 0},
    {"context": "Two and two make", "choices": [" five", " four"], "label": 1},
    {"context": "Käse is made of", "choices": [" milk", " stone"], "label": 0},
]


@pytest.fixture
def capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    file = tmp_path / "capitals.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    task = JsonlTask("capitals", "Capitals", "len_norm", "mine, 0-shot", file)
    monkeypatch.setitem(TASKS, task.name, task)
    return task


def test_a_task_from_a_file(capitals: Task, model, checkpoint: Path, tmp_path: Path) -> None:
    options = Options(suite="downstream", tasks=("capitals", "copa"), limit=3, per_example=True)
    result = evaluate(str(checkpoint), options, tmp_path / "out")
    entry = result["downstream"]["capitals"]
    assert entry["n"] == 3 and "Capitals" in markdown([result]) and "Capitals" in markdown([result]).split("metric")[1]
    rows = [json.loads(line) for line in (tmp_path / "out" / "examples" / "capitals.jsonl").read_text().splitlines()]
    for question, row in zip(QUESTIONS, rows, strict=True):
        scores = []
        for choice in question["choices"]:
            context, tokens = model.tokenizer.encode(question["context"]), model.tokenizer.encode(choice)
            with torch.no_grad():
                logits = model.module(torch.tensor([context + tokens]))[0].log_softmax(-1)
            scores.append(sum(logits[len(context) - 1 + i, t].item() for i, t in enumerate(tokens)) / len(choice))
        assert [x / n for x, n in zip(row["log_likelihoods"], row["characters"])] == pytest.approx(scores, abs=1e-4)
        assert row["prediction"] == int(np.argmax(scores)) and row["label"] == question["label"]


def test_a_registered_task_is_known_everywhere(capitals: Task, tmp_path: Path) -> None:
    check_downstream(from_dict(RunConfig, tiny_config(tmp_path, eval=dict(downstream=dict(tasks=["capitals"])))))
    with pytest.raises(UserError, match="did you mean 'capitals'"):
        resolve_tasks(["capital"])
    with pytest.raises(ValueError, match="metric 'best' is none of acc, len_norm"):
        JsonlTask("x", "X", "best", "", tmp_path)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"context": "a"}', '{"context": "a", "choices": ["b"], "label": 1}', "[" * 100_000,
     '{"context": "a", "choices": [], "label": 0}', '{"context": "a", "choices": ["b", 3], "label": 0}',
     '{"context": "", "choices": ["b"], "label": 0}', '{"context": "a", "choices": ["b"], "label": "0"}'],
    ids=lambda line: line[:40],
)  # fmt: skip
def test_lines_that_are_no_questions(line: str, model, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match="bad: expected an object with context, choices and label in .*line 2"):
        JsonlTask("bad", "Bad", "acc", "", file).questions(model.tokenizer, None)


def test_a_file_that_is_missing_or_empty(model, tmp_path: Path) -> None:
    task = JsonlTask("bad", "Bad", "acc", "", tmp_path / "bad.jsonl")
    for read in (task.describe, lambda: task.questions(model.tokenizer, None)):
        with pytest.raises(UserError, match="bad: expected a readable file"):
            read()
    task.path.write_text("\n\n")
    with pytest.raises(UserError, match="at least one question"):
        task.questions(model.tokenizer, None)
    task.path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 1"):
        task.questions(model.tokenizer, None)


class Counting(DocumentSet):
    """Documents 1 2 3 .. n."""

    def open(self, model: ModelInfo, base_dir: str | None = None) -> OpenSet:
        def documents() -> Iterator[TokenDocument]:
            for n in (5, 9):
                yield TokenDocument(np.arange(1, n), None)

        return OpenSet(self.name, self.title, "numbers", documents)


def test_a_registered_document_set(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "counting", Counting("counting", "Counting"))
    result = evaluate(str(checkpoint), Options(suite="perplexity", sets=("counting",)), tmp_path)
    assert result["perplexity"]["counting"]["n"] == 2 and "Counting" in markdown([result])
    with pytest.raises(UserError, match="did you mean 'counting'"):
        Options(sets=("countin",))
