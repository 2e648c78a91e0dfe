"""Tasks while a model trains: figures in metrics.jsonl that a separate evaluation of the checkpoint reproduces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moda.config.schema import RunConfig
from moda.errors import UserError
from moda.typed import from_dict
from moda_evals.downstream import evaluate_task
from moda_evals.in_loop import check_downstream
from moda_evals.model import load
from moda_evals.tasks import TASKS
from tests.tiny import run, tiny_config, write_config


def test_in_loop_figures_are_those_of_eval(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        train=dict(max_steps=2, sequence_length=128),
        optim=dict(warmup_steps=1),
        eval=dict(on_finish=True, downstream=dict(tasks=["copa", "winogrande"], interval=2, limit=8)),
        checkpoint=dict(interval=2),
    )
    done = run(config, processes=2)
    assert done.returncode == 0, done.stderr
    assert "downstream copa:" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = {k: v for line in lines if line["step"] == 2 for k, v in line.items()}
    model = load(str(tmp_path / "run" / "step2"))
    for name in ("copa", "winogrande"):
        alone = evaluate_task(model, TASKS[name], limit=8, truncate=True)
        assert figures[f"eval/downstream/{name}/accuracy"] == pytest.approx(alone["accuracy"])
        assert figures[f"eval/downstream/{name}/bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-4)
        assert figures[f"eval/downstream/{name}/standard_error"] == pytest.approx(alone["standard_error"])


def test_unknown_task_is_refused_before_training(tmp_path: Path) -> None:
    config = from_dict(RunConfig, tiny_config(tmp_path, eval=dict(downstream=dict(tasks=["pica"]))))
    with pytest.raises(UserError, match="eval.downstream.tasks: expected known tasks, got pica .did you mean 'piqa'"):
        check_downstream(config)
    with pytest.raises(UserError, match="eval.downstream.limit"):
        from_dict(RunConfig, tiny_config(tmp_path, eval=dict(downstream=dict(tasks=["piqa"], limit=0))))
