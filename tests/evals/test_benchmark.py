"""The speed comparison: both ways of batching give the same scores, and requests survive being saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from moda_evals.benchmark import benchmark, load_spans, save_spans
from moda_evals.downstream import fit
from moda_evals.tasks import TASKS, load_questions


def test_benchmark_checks_and_measures(model, tmp_path: Path) -> None:
    spans = [
        s for q in fit(TASKS["copa"], load_questions(TASKS["copa"], model.tokenizer, 10), 512, False)[0] for s in q
    ]
    save_spans(spans, tmp_path / "r.json.gz")
    assert load_spans(tmp_path / "r.json.gz") == spans
    found = benchmark(model, spans, batch_tokens=256, repeats=1)
    assert found["requests"] == 20 and found["worst_difference"] < 1e-3
    assert set(found["tokens_per_second"]) == {"scored", "scored_run", "padded", "forward"}
    assert found["tokens_run"] < found["tokens"] == sum(len(s.ids) for s in spans)
    assert found["scored_over_padded"] == pytest.approx(
        found["tokens_per_second"]["scored"] / found["tokens_per_second"]["padded"]
    )
