"""Tasks while a model trains: figures in metrics.jsonl that a separate evaluation of the checkpoint reproduces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evals.downstream import evaluate_task
from evals.in_loop import check_downstream
from evals.model import load
from evals.tasks import TASKS
from moda.config.schema import RunConfig
from moda.config.typed import from_dict
from moda.errors import UserError
from tests.tiny import environment, run, tiny_config, write_config


@pytest.mark.parametrize("processes", [None, 2])
def test_in_loop_figures_are_those_of_eval(processes: int, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        train=dict(max_steps=4, sequence_length=256),
        eval=dict(on_finish=True, downstream=dict(tasks=["copa", "arc_easy"], interval=2, limit=16)),
        checkpoint=dict(interval=2),
    )
    done = run(config, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "downstream copa:" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for step in (2, 4):
        model = load(str(tmp_path / "run" / f"step{step}"))
        for name in ("copa", "arc_easy"):
            alone = evaluate_task(model, TASKS[name], limit=16, truncate=True)
            figures = {k: v for line in lines if line["step"] == step for k, v in line.items()}
            assert figures[f"eval/downstream/{name}/accuracy"] == pytest.approx(alone["accuracy"])
            assert figures[f"eval/downstream/{name}/bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-4)
            assert figures[f"eval/downstream/{name}/standard_error"] == pytest.approx(alone["standard_error"])


def test_unknown_task_is_refused_before_training(tmp_path: Path) -> None:
    config = from_dict(RunConfig, tiny_config(tmp_path, eval=dict(downstream=dict(tasks=["pica"]))))
    with pytest.raises(UserError, match="eval.downstream.tasks: expected known tasks, got pica .did you mean 'piqa'"):
        check_downstream(config)
    with pytest.raises(UserError, match="eval.downstream.limit"):
        from_dict(RunConfig, tiny_config(tmp_path, eval=dict(downstream=dict(tasks=["piqa"], limit=0))))


def test_moda_does_not_import_evals() -> None:
    code = (
        "import sys, moda.train.run; assert not [m for m in sys.modules if m.split('.')[0] in ('evals', 'olmo_eval')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
