"""Sweeps: what a file comes to, runs made equal, what folders say, and running them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moda.errors import UserError
from moda.files import locked
from moda.sweep import Cell, load_sweep
from moda.sweep import run as running
from moda.sweep.data import missing_data, prepared
from moda.sweep.match import flops_per_token, model_of, tokens_of
from moda.sweep.run import Board, Worker, run_sweep, workers
from moda.sweep.state import state_of
from moda.sweep.table import board_table, plan_table
from moda.typed import to_dict
from moda_cli import main
from tests.tiny import PROCESSES, ROOT, environment, write_config

AXES: list[dict[str, Any]] = [
    {"model.norm_placement": ["pre", "post"]},
    {"depth": {"none": {"model.depth": None}, "moda": {}}},
]


def sweep_file(folder: Path, /, **keys: Any) -> Path:
    write_config(folder)
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({"config": "tiny.yaml", "folder": str(folder / "runs"), "axes": AXES, **keys}, sort_keys=False)
    )
    return path


def test_product_names_and_overrides(tmp_path: Path) -> None:
    zipped = {"optim.lr": [1e-3, 2e-3], "optim.warmup_steps": [2, 3]}
    path = sweep_file(
        tmp_path, axes=[*AXES, zipped], seeds=[0, 7], override={"train.max_steps": 5},
        exclude=[{"depth": "none", "model.norm_placement": ["post"]}],
    )  # fmt: skip
    sweep = load_sweep(path, ["optim.eps=1e-6"])
    assert [c.name for c in sweep.cells[:4]] == [
        "pre-none-lr0.001-warmup_steps2-seed0", "pre-none-lr0.001-warmup_steps2-seed7",
        "pre-none-lr0.002-warmup_steps3-seed0", "pre-none-lr0.002-warmup_steps3-seed7",
    ]  # fmt: skip
    assert len(sweep.cells) == 3 * 2 * 2 and not any(c.name.startswith("post-none") for c in sweep.cells)
    last = sweep.cells[-1].config
    assert (last.model.norm_placement.name, last.optim.lr, last.optim.warmup_steps) == ("post", 2e-3, 3)
    assert (last.train.seed, last.train.max_steps, last.optim.eps) == (7, 5, 1e-6)
    assert last.model.depth is not None and sweep.cells[0].config.model.depth is None
    assert last.save_folder == str(tmp_path / "runs" / sweep.cells[-1].name)
    assert last.logging.wandb.group == "study"


def test_one_word_on_two_axes_is_told_apart(tmp_path: Path) -> None:
    axes = [{"model.depth.key_norm": ["writer", "none"]}, {"model.depth.rope": ["same_position", "none"]}]
    names = [c.name for c in load_sweep(sweep_file(tmp_path, axes=axes)).cells]
    assert names == [
        "writer-same_position", "writer-rope-none", "key_norm-none-same_position", "key_norm-none-rope-none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "keys, error",
    [
        (dict(axes=[*AXES, {"model.depth": [None]}]), "model.depth: expected to be set once, got axis depth and axis"),
        (dict(override={"model.norm_placement": "pre"}), "model.norm_placement: expected to be set once"),
        (dict(axes=[{"model.n_layer": [1, 2]}]), r"run n_layer1: model.n_layer: .*did you mean 'n_layers'"),
        (dict(axes=[{"model.n_heads": [3]}]), "run n_heads3: model.n_heads"),
        (dict(axes=[{"optim.lr": 1e-3}]), "keys with lists of values"),
        (dict(axes=[{"optim.lr": [1e-3], "optim.eps": [1e-6, 1e-8]}]), "all of one length"),
        (dict(axes=[]), "at least one axis"),
        (dict(axes=[{"train.seed": [1, 2]}]), "seeds"),
        (dict(axes=[{"model.depth.read": ["all", "all"]}]), "names that differ"),
        (dict(seeds=[1, 1]), "different numbers"),
        (dict(exclude=[{"depths": "none"}]), r"exclude\[0\].depths: .*did you mean 'depth'"),
        (dict(exclude=[{"depth": "mda"}]), "expected one of none, moda, got mda"),
        (dict(exclude=[{"depth": ["none", "moda"]}]), "at least one run that is left"),
        (dict(match={"by": "params", "to": {"depth": "mod"}}), "match.to.depth: expected one of none, moda"),
        (dict(match={"by": "params", "to": {"depth": "none"}, "change": "train.max_tokens"}), "match.change"),
        (dict(match={"by": "time", "to": {"depth": "none"}}), "match.measured"),
        (dict(match={"by": "params", "to": {"depth": "none"}}, exclude=[{"depth": "none"}]), "an excluded one"),
        (dict(axis=[]), "did you mean 'axes'"),
        (dict(axes=[{"a": {"x y": {}, "x-y": {}}}]), r"axes\[0\]: expected values with names that differ"),
        (
            dict(axes=[{"a": {"x-y": {}, "x": {}}}, {"b": {"z": {}, "y-z": {}}}]),
            "runs with names that differ.* got x-y-z",
        ),
        (dict(axes=[{"a": {"logs": {}}}]), "names that differ from each other and from logs"),
        (dict(axes=[{"a": {"x": {"config": 5}}}]), "config: expected a string, got 5"),
        (dict(override={"train": {"save_folder": "x"}}), "override: expected keys that .* got train.save_folder"),
        (
            dict(axes=[{"a": {"x": {"optim": {"lr": 1}}}}], override={"optim.lr": 1}),
            "optim.lr: expected to be set once",
        ),
        (dict(match={"by": "params", "to": {}}), "match.to: expected an axis"),
        (dict(match={"by": "params", "to": {"depth": ["none", "moda"]}}), "match.to: expected an axis"),
        (dict(folder="s3://bucket/x"), "folder: expected a folder, got s3"),
    ],
)
def test_bad_files(tmp_path: Path, keys: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        load_sweep(sweep_file(tmp_path, **keys))


@pytest.mark.parametrize("typed", ["train={seed: 4}", "train.seed=4", "name=x", "model.norm_placement=peri"])
def test_what_a_sweep_or_an_axis_sets_is_not_typed(tmp_path: Path, typed: str) -> None:
    key = "model.norm_placement: expected to be set once" if "norm" in typed else "the command line: expected keys"
    with pytest.raises(UserError, match=key):
        load_sweep(sweep_file(tmp_path, override={"optim.lr": 1e-3}), ["optim.lr=2e-3", typed])


@pytest.mark.parametrize("gpus", ["", ",", "0,0", "-1", "a,b"])
def test_gpus_that_would_hide_all_of_them(tmp_path: Path, gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", str(sweep_file(tmp_path)), "--dry-run", f"--gpus={gpus}"])
    assert f"expected different GPUs such as 0,1, got {gpus!r}" in capsys.readouterr().err


def _by_name(cells: list[Cell]) -> dict[str, Cell]:
    return {cell.name: cell for cell in cells}


@pytest.mark.parametrize("change", ["model.ffn_hidden_size", "model.n_layers"])
def test_equal_parameters(tmp_path: Path, change: str) -> None:
    match = {"by": "params", "to": {"depth": "moda"}, "change": change}
    override = {"model.n_layers": 40, "model.d_model": 64, "model.ffn_hidden_size": 192}
    cells = _by_name(load_sweep(sweep_file(tmp_path, match=match, override=override)).cells)
    plain, moda = (model_of(cells[name].config).num_counted_params for name in ("pre-none", "pre-moda"))
    assert plain == pytest.approx(moda, rel=0.02) and cells["pre-moda"].changed == ""
    size = getattr(cells["pre-none"].config.model, change.removeprefix("model."))
    assert size > override[change] and f"-> {size:,}" in cells["pre-none"].changed
    for other in (size - 16, size + 16) if "ffn" in change else (size - 1, size + 1):  # none is nearer
        near = model_of(cells["pre-none"].with_key(change, other, "").config).num_counted_params
        assert abs(near - moda) >= abs(plain - moda)


def test_equal_flops_and_time_by_tokens(tmp_path: Path) -> None:
    match: dict[str, Any] = {"by": "flops", "to": {"depth": "none"}, "change": "train.max_tokens"}
    override = {"train.max_steps": 1000}
    cells = _by_name(load_sweep(sweep_file(tmp_path, match=match, override=override)).cells)
    plain, moda = cells["pre-none"].config, cells["pre-moda"].config
    total = tokens_of(plain) * flops_per_token(plain)
    assert tokens_of(plain) == 1000 * 4 * 32 and tokens_of(moda) * flops_per_token(moda) == pytest.approx(
        total, rel=1e-3
    )
    speeds = {"pre-none": 100.0, "pre-moda": 80.0, "post-none": 100.0, "post-moda": 50.0}
    for name, speed in speeds.items():
        (tmp_path / "measured" / name).mkdir(parents=True)
        lines = [{"step": s, "loss": 1.0, "tokens_per_second": 1.0 if s < 10 else speed} for s in range(40)]
        (tmp_path / "measured" / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    match = {"by": "time", "to": {"depth": "none"}, "measured": str(tmp_path / "measured")}
    cells = _by_name(load_sweep(sweep_file(tmp_path, match=match, override=override)).cells)
    assert [cells[name].config.train.steps for name in speeds] == [1000, 800, 1000, 500]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sweeps_that_come_along(path: Path) -> None:
    sweep = load_sweep(path)
    assert len({cell.name for cell in sweep.cells}) == len(sweep.cells) > 1
    missing = missing_data(sweep.cells)
    assert missing is None or sweep.section.data, "it says how to get its data"


def test_a_prepared_folder_is_one_option(tmp_path: Path) -> None:
    shards = {"train/web-00000.npy": "train", "validation/web-00000.npy": "validation"}
    entries = {name: {"bytes": 2, "source": "web", "split": split} for name, split in shards.items()}
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"name": "gpt-neox"}, "shards": entries}))
    cell = load_sweep(ROOT / "configs" / "sweeps" / "demo.yaml", prepared(str(tmp_path))).cells[0]
    data = cell.config.data
    assert data.paths == [str(tmp_path / "train" / "*.npy")] and data.text is None
    assert data.validation == {"web": [str(tmp_path / "validation" / "web-00000.npy")]}
    with pytest.raises(UserError, match="moda prepare"):
        prepared(str(tmp_path / "none"))


#: Stands in for training: some steps, then a summary; "post-none" fails.
FAKE = """
import json, pathlib, sys
folder, name, steps, config = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
folder.mkdir(parents=True, exist_ok=True)
(folder / "new").write_text(config)
(folder / "new").rename(folder / "config.yaml")
with (folder / "metrics.jsonl").open("a") as f:
    f.write(json.dumps({"step": steps, "loss": 2.5, "tokens_per_second": 10.0}) + "\\n{\\"step\\": 3")
if name == "post-none":
    sys.exit("error: optim.lr: expected less")
(folder / "summary.json").write_text(json.dumps({"steps": steps}))
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are started, each with :data:`FAKE` in its place."""
    names: list[str] = []

    def fake(cell: Cell, processes: int) -> list[str]:
        names.append(cell.name)
        config = yaml.safe_dump(to_dict(cell.config))
        return [sys.executable, "-c", FAKE, str(cell.folder), cell.name, str(cell.config.train.steps), config]

    monkeypatch.setattr(running, "command", fake)
    monkeypatch.setattr(running, "_POLL", 0.05)
    return names


def test_runs_are_run_once_and_a_failure_stops_nothing(tmp_path: Path, started: list[str]) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    shown: list[Board] = []
    board = run_sweep(sweep.cells, tmp_path / "logs", [Worker()] * 2, shown.append)
    assert sorted(started) == sorted(c.name for c in sweep.cells)
    assert board.failed == ["post-none"] and "optim.lr: expected less (exit code 1," in board.notes["post-none"]
    assert [state_of(c).kind for c in sweep.cells] == ["finished", "finished", "unfinished", "finished"]
    assert board_table(board).row_count == 4 and shown
    table, total = plan_table(sweep.cells, board.states, 1, 2)
    assert "from 4 measured runs" in total and table.row_count == 4
    started.clear()
    again = run_sweep(sweep.cells, tmp_path / "logs", [Worker()], shown.append)
    assert started == ["post-none"] and again.failed == ["post-none"]


def test_a_lost_gpu_is_given_up_and_its_run_is_resumed_elsewhere(
    tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    monkeypatch.setattr(running, "_works", lambda worker: worker.gpus != ("0",))
    cells = [cell for cell in sweep.cells if cell.name == "post-none"]
    board = run_sweep(cells, tmp_path / "logs", [Worker(("0",)), Worker(("1",))], lambda b: None)
    assert started == ["post-none"] * 2 and "exit code 1" in board.notes["post-none"]
    started.clear()
    board = run_sweep(cells, tmp_path / "logs", [Worker(("0",))], lambda b: None)
    assert started == ["post-none"] and board.notes == {"post-none": "no GPU is left that answers"}


def test_the_run_of_another_sweep_is_refused_before_anything_starts(tmp_path: Path, started: list[str]) -> None:
    path = sweep_file(tmp_path)
    run_sweep(load_sweep(path).cells[:1], tmp_path / "logs", [Worker()], lambda b: None)
    started.clear()
    changed = load_sweep(path, ["optim.weight_decay=0.3"]).cells
    with pytest.raises(UserError, match=r"run pre-none: optim.weight_decay: expected 0.3 .*got 0.1"):
        run_sweep(changed, tmp_path / "logs", [Worker()], lambda b: None)
    assert started == []


def _hold(folder: str, held: Any) -> None:
    with locked(Path(folder), "sweep", "sweep"):
        held.set()
        time.sleep(60)


def test_a_run_of_two_sweeps_at_once_is_refused_before_anything_starts(tmp_path: Path, started: list[str]) -> None:
    cells = load_sweep(sweep_file(tmp_path)).cells[:3]
    held = PROCESSES.Event()
    other = PROCESSES.Process(target=_hold, args=(str(tmp_path / "logs" / ".pre-moda"), held), daemon=True)
    other.start()
    assert held.wait(30)
    with pytest.raises(UserError, match=rf"run pre-moda: expected no other sweep in .*, got process {other.pid} on"):
        run_sweep(cells, tmp_path / "logs", [Worker()], lambda b: None)
    assert started == []
    assert not run_sweep([cells[0]], tmp_path / "logs", [Worker()], lambda b: None).failed  # as with --only
    other.kill()


def test_workers() -> None:
    assert workers([], 3, 1) == [Worker()] * 3
    assert workers(["0", "1", "2"], 1, 2) == [Worker(("0", "1"), 2)]
    assert workers(["0", "1"], 2, 1) == [Worker(("0",)), Worker(("1",))] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="no signal on the death of a parent")
def test_runs_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    child = f"""if True:
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(told)!r}).touch() or exit())
        print("ready", flush=True)
        time.sleep(60)"""
    parent = """if True:
        import subprocess, sys, time
        from moda.sweep.run import end_with_parent
        subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, preexec_fn=end_with_parent)
        time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, env=environment())
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    for _ in range(100):
        if told.exists():
            return
        time.sleep(0.1)
    pytest.fail("the run was not told")


def test_a_real_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = [{"model.norm_placement": ["pre"]}, {"optim.eps": [1e-8, 1e-7]}]
    path = sweep_file(tmp_path, axes=axes, override={"train.max_steps": 3})
    assert main(["sweep", str(path), "--jobs", "2"]) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    for cell in load_sweep(path).cells:
        assert state_of(cell).kind == "finished" and (cell.folder / "step3").is_dir()


def test_jobs_through_submitit(tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    from moda.sweep import slurm

    monkeypatch.setattr(slurm, "command", running.command)
    cells = load_sweep(sweep_file(tmp_path)).cells[:2]
    jobs = slurm.submit(cells, tmp_path / "slurm", ["cluster=local", "timeout_min=2"], 1)
    assert len(set(jobs)) == 2 and started == [cell.name for cell in cells]
    deadline = time.monotonic() + 60
    while any(state_of(cell).kind != "finished" for cell in cells) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [state_of(cell).kind for cell in cells] == ["finished"] * 2
    with pytest.raises(UserError, match="--slurm"):
        slurm.submit(cells, tmp_path / "slurm", ["cluster=local", "timeout_mins=2"], 1)
