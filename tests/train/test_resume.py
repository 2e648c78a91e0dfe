"""What a run keeps over its sessions: optimizer, history, budget, checkpoints, time, metrics, and its folder for itself."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from olmo_core.train.train_module import TransformerTrainModule

from moda.checkpoints import OwnCheckpointer, check_same_run, checkpoints_of_run, remove_old, write_checksums
from moda.config import load_config
from moda.errors import UserError
from moda.files import locked
from moda.train.build import CosineOverTokens, build_train_module
from moda.train.callbacks import ClockCallback, SkipStepCallback
from moda.train.environment import on_first_rank
from moda.train.metrics import MetricsFile, read_metrics
from moda.train.plan import make_plan
from moda.train.run import train
from moda.typed import to_dict
from tests.tiny import make_tokenizer, write_config


def build(folder: Path, *overrides: str) -> TransformerTrainModule:
    module = build_train_module(make_plan(load_config(write_config(folder), overrides), 1), torch.device("cpu"))
    assert isinstance(module, TransformerTrainModule)
    return module


def step(module: TransformerTrainModule, number: int, loss: float = 2.0, norm: float = 1.0) -> float:
    """An optimizer step with gradients that depend on its number alone; whether it was skipped."""
    generator = torch.Generator().manual_seed(number)
    for p in module.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optim: Any = module.optim
    for group in optim.param_groups:
        group["lr"] = group["initial_lr"]  # the schedule's part
    optim.latest_loss, optim.latest_grad_norm = torch.tensor(loss), torch.tensor(norm)
    optim.step()
    return float(getattr(optim, "step_skipped", 0.0))


def assert_same(a: TransformerTrainModule, b: TransformerTrainModule, same: bool = True) -> None:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs) == same


@pytest.mark.parametrize("name", ["adamw", "skip_step_adamw"])
def test_changed_optimizer_settings_take_effect(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"initial_lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}
    overrides = ["optim.lr=1e-3", "optim.betas=[0.8,0.9]", "optim.eps=1e-3", "optim.weight_decay=0.5"]
    begun = build(tmp_path, f"optim.name={name}")
    for number in range(3):
        step(begun, number)
    checkpointer = OwnCheckpointer(tmp_path / "work")
    checkpointer.save(tmp_path / "step3", begun, {})
    changed = build(tmp_path, f"optim.name={name}", *overrides)
    checkpointer.load(tmp_path / "step3", changed, load_trainer_state=False, load_optim_state=True)
    assert_same(begun, changed)
    assert begun.optim is not None and changed.optim is not None
    for group, new in zip(begun.optim.param_groups, changed.optim.param_groups, strict=True):
        assert group["weight_decay"] in (0.0, 0.1) and group["initial_lr"] == 3e-3
        group.update(changes, weight_decay=0.5 if group["weight_decay"] else 0.0)
        assert {key: new[key] for key in changes} == {key: group[key] for key in changes}
    for module in (begun, changed):  # a run that really had the new values from here, and one that resumed with them
        for number in range(3, 5):
            step(module, number)
    assert_same(begun, changed)


def test_a_skipped_step_is_skipped_after_resuming_too(tmp_path: Path) -> None:
    def callback(module: TransformerTrainModule) -> SkipStepCallback:
        made = SkipStepCallback()
        made.trainer = SimpleNamespace(train_module=module)  # type: ignore[assignment]
        return made

    begun, resumed, forgetful = (build(tmp_path, "optim.name=skip_step_adamw") for _ in range(3))
    for number in range(66):
        step(begun, number, 2.0 + math.sin(number) / 10, 1.0 + math.cos(number) / 10)
    checkpointer = OwnCheckpointer(tmp_path / "work")
    checkpointer.save(tmp_path / "step66", begun, {"callbacks": {"skip_step": callback(begun).state_dict()}})
    for module in (resumed, forgetful):
        state = checkpointer.load(tmp_path / "step66", module, load_trainer_state=True, load_optim_state=True)
        assert state is not None
        if module is resumed:
            callback(resumed).load_state_dict(state["callbacks"]["skip_step"])
    for spiked in ({"loss": 9.0}, {"norm": 9.0}):
        skipped = [step(module, 66, **spiked) for module in (begun, resumed, forgetful)]
        assert skipped == [1.0, 1.0, 0.0]
    assert step(begun, 67) == step(resumed, 67) == 0.0
    assert_same(begun, resumed)
    assert_same(begun, forgetful, same=False)
    unclipped = build(tmp_path, "optim.name=skip_step_adamw", "optim.max_grad_norm=null")
    callback(unclipped).load_state_dict(callback(begun).state_dict())  # norms that would never be renewed
    assert callback(unclipped)._optims[0].latest_loss is None


def test_the_learning_rate_follows_the_tokens() -> None:
    """Warm-up in steps; the cosine goes on where it was when the batch size changes, and ends with the budget."""
    schedule, group = CosineOverTokens(warmup=2, alpha_f=0.1), {"lr": 1.0, "initial_lr": 1.0}

    def rate(at: int, tokens: int) -> float:
        trainer: Any = SimpleNamespace(max_tokens=480, max_steps=None, global_step=at, global_train_tokens_seen=tokens)
        trainer.max_steps = 99  # of no account
        return float(schedule.set_lr(group, trainer))

    def cosine(done: float) -> float:
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    assert rate(1, 40) == 0.5 and rate(1, 80) == 0.5
    assert [rate(s, 40 * s) for s in (2, 5, 12)] == [1.0, cosine(0.3), pytest.approx(0.1)]
    # 8 steps of 40 tokens, then 80 a step
    assert cosine(0.6) == rate(8, 320) > rate(9, 400) > rate(10, 480) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps of 4 sequences."""
    folder = tmp_path_factory.mktemp("whole")
    resume(write_config(folder), folder / "run")
    return folder


def resume(config: Path, folder: Path, *overrides: str) -> int:
    """Train in this process and return the steps that are done."""
    own = ["optim.name=skip_step_adamw", f"train.save_folder={folder}"]
    return train(load_config(config, [*own, *overrides])).steps


@pytest.mark.parametrize("batch, steps", [(8, 10), (2, 16), (4, 12)])
def test_a_budget_of_tokens_is_kept_whatever_the_batch(batch: int, steps: int, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole / "run" / "step8", tmp_path / "step8")
    state = torch.load(folder / "train" / "rank0.pt", weights_only=False)
    assert [len(seen) for seen in state["callbacks"]["skip_step"].values()] == [8, 8]
    state["callbacks"]["clock"]["seconds"] = 1000.0
    torch.save(state, folder / "train" / "rank0.pt")
    write_checksums(folder)
    budget = [f"train.max_tokens={48 * 32}", "train.max_steps=null", f"train.global_batch_size={batch}"]
    assert resume(whole / "tiny.yaml", tmp_path, *budget) == steps
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(9, steps + 1))
    assert lines[-1]["tokens"] == 48 * 32 and lines[-1]["lr"] == pytest.approx(3e-4, rel=1e-6)
    summary = tmp_path / "summary.json"
    assert 1000 < json.loads(summary.read_text())["seconds"] < 1200  # of both sessions
    composition = json.loads((tmp_path / "data.json").read_text())
    assert composition["trained_on"] == {"steps": steps, "tokens": 48 * 32, "sources": ANY}
    files = {path: path.read_bytes() for path in (summary, tmp_path / "config.yaml")}
    assert resume(whole / "tiny.yaml", tmp_path, *budget, "logging.interval=3") == steps  # it is complete
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_tokenizer_of_another_size_is_refused_by_name(whole: Path, tmp_path: Path) -> None:
    larger = make_tokenizer(tmp_path / "tokenizer.json", size=330)
    shutil.copytree(whole / "run" / "step4", tmp_path / "run" / "step4")
    for way in ([], ["train.save_folder=" + str(tmp_path / "new"), f"train.load_path={tmp_path / 'run' / 'step4'}"]):
        with pytest.raises(UserError, match=r"data.tokenizer: .*step4, whose model has 320 rows .* got 330 rows"):
            resume(whole / "tiny.yaml", tmp_path / "run", f"data.tokenizer={larger}", *way)


def test_a_batch_that_does_not_fit_where_the_run_stopped(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "run" / "step4", tmp_path / "step4")
    with pytest.raises(
        UserError, match=r"train.global_batch_size: expected a divisor of the 16 sequences .*step4.* got 6"
    ):
        resume(whole / "tiny.yaml", tmp_path, "train.global_batch_size=6")


def fake(folder: Path, number: int, save_folder: Path | None, ephemeral: bool = False) -> Path:
    """A checkpoint folder with all that tells whether it is whole and whose it is."""
    path = folder / f"step{number}"
    for file in ("train/rank0.pt", "model_and_optim/.metadata"):
        (path / file).parent.mkdir(parents=True)
        (path / file).touch()
    (path / "config.json").write_text(json.dumps({"train": {"save_folder": save_folder and str(save_folder)}}))
    (path / ".metadata.json").write_text(json.dumps({"ephemeral": ephemeral}))
    (path / "checksums.json").write_text("{}")
    return path


def test_keep_counts_the_run_s_own_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    for number in (10, 20, 30, 45, 50, 70):
        fake(run, number, Path("run") if number == 10 else run, ephemeral=number == 45)
    copied, nobody, cut, named = fake(run, 11, other), fake(run, 12, None), fake(run, 13, run), run / "step30-best"
    (cut / "checksums.json").unlink()
    named.mkdir()
    (run / ".step5.removed").mkdir()  # a removal that was interrupted
    saved = checkpoints_of_run(run, 50)  # 70 was passed over as damaged
    assert [p.name for p in saved] == ["step10", "step20", "step30", "step45", "step50"]
    saved = remove_old([*saved, fake(run, 60, run)], 2)
    assert [p.name for p in saved] == ["step50", "step60"]
    assert {p.name for p in run.iterdir()} == {
        "step50",
        "step60",
        "step70",
        named.name,
        *(p.name for p in (copied, nobody, cut)),
    }
    saved = remove_old([*saved, fake(run, 65, run, ephemeral=True)], 1)
    assert [p.name for p in saved] == ["step60", "step65"]  # an ephemeral one is beside those that are kept
    assert remove_old(saved, None) == saved
    shutil.rmtree(run / "step60")  # by hand
    (run / "step65" / ".metadata.json").write_text("{")
    assert [p.name for p in remove_old([*saved, fake(run, 66, run)], 3)] == ["step65", "step66"]


def test_metrics_lose_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    metrics = MetricsFile(str(tmp_path))
    metrics.rewind(2)
    assert read_metrics(file) == lines[:2] and file.read_text().endswith("}\n")
    metrics.add(2, {"eval/text/loss": 5.0})  # evaluated again when it resumes
    metrics.add(3, {"loss": 1.5})
    assert read_metrics(file) == [lines[0], {**lines[1], "eval/text/loss": 5.0}, {"step": 3, "loss": 1.5}]
    file.write_text("".join(json.dumps(line) + "\n" for line in (*lines, {"step": 2, "loss": 2.5})))
    MetricsFile(str(tmp_path)).rewind(9)
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]


@pytest.mark.parametrize("value", ['"x"', "[1]", '{"a": 1}', "NaN", "1e400", "-1e308", "9" * 400, "null"])
def test_figures_are_finite_numbers_or_none(value: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": {value}, "lr": 0.5}}\n{{"step": {value}}}\n{{"step": -1}}\n{{"step": true}}')
    assert read_metrics(file) == [{"step": 1, "loss": None, "lr": 0.5}]


def test_seconds_add_up() -> None:
    first, second = ClockCallback(), ClockCallback()
    first._started -= 100
    second.load_state_dict(first.state_dict())
    second._started -= 10
    assert 110 <= second.seconds < 120


def test_settings_that_a_run_keeps_are_refused_by_name(tmp_path: Path) -> None:
    def config(*overrides: str) -> Any:
        return load_config(write_config(tmp_path), overrides)

    checkpoint = tmp_path / "run" / "step4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(to_dict(config("train.load_path=elsewhere"))))
    for override, before in (
        ("optim.name=skip_step_adamw", "adamw"),
        ("train.seed=1", "0"),
        ("train.sequence_length=64", "32"),
        ("train.load_path=other", "elsewhere"),
        ("model.init_std=0.1", "0.02"),
    ):
        with pytest.raises(UserError, match=rf"{override.split('=')[0]}: expected {before}, as .*train.save_folder"):
            check_same_run(checkpoint, config(override))
    for harmless in ("train.load_path=null", "optim.lr=1.0", "train.max_steps=99", "model.attention_backend=reference"):
        check_same_run(checkpoint, config(harmless))


def _hold(folder: str, held: Any) -> None:
    with locked(Path(folder), "train.save_folder", "run"):
        held.set()
        time.sleep(60)


def test_a_second_run_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = write_config(tmp_path), tmp_path / "run"
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=_hold, args=(str(folder), held))
    other.start()
    try:
        assert held.wait(30)
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(tmp_path)
        for way in (str(folder), "link", "./run/"):
            with pytest.raises(
                UserError, match=rf"train.save_folder: .*no other run .*process {other.pid} on .* since 20"
            ):
                train(load_config(config, [f"train.save_folder={way}"]))
        assert os.listdir(folder) == [".lock"]
    finally:
        other.kill()
        other.join()
    with locked(folder, "train.save_folder", "run"):  # the lock went with its process
        pass


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda folder: (folder / "run").write_text("a file"), "train.save_folder"),
        (lambda folder: (folder / "run" / "train.log").mkdir(parents=True), "train.save_folder"),
        (lambda folder: [p.unlink() for p in (folder / "text").iterdir()], "data.text"),
    ],
    ids=["a file", "a log that cannot be written", "no data"],
)
def test_a_refused_run_leaves_nothing(change: Callable[[Path], object], key: str, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    change(tmp_path)
    before = {p for p in tmp_path.rglob("*") if p.name != ".lock"}
    with pytest.raises(UserError, match=key):
        train(config)
    assert {p for p in tmp_path.rglob("*") if p.name != ".lock"} == before


def test_files_that_cannot_be_written_are_the_user_s(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.save_folder: .*nowhere.*No such file"):
        on_first_rank(lambda: (tmp_path / "nowhere" / "file").write_text("x"))
    with pytest.raises(ZeroDivisionError):
        on_first_rank(lambda: 1 // 0)
