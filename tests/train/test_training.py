"""Runs from the command line: resuming bit for bit, signals, damaged checkpoints, two processes."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from moda.checkpoints import damage, find_resumable
from moda.checkpoints.read import read_weights
from moda.config import load_config
from moda.errors import UserError
from moda.files import read_metrics
from moda.report import FILES
from moda.train import plan
from moda.train import run as training
from tests.tiny import ROOT, STEPS, command, environment, make_text, run, weights, write_config


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line}


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(write_config(folder, eval=dict(on_start=True, on_finish=True)))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def start_and_signal(config: Path, run_folder: Path, after_step: int, number: signal.Signals) -> int:
    """Start training, send a signal once ``after_step`` has been reported, and return the exit code.

    What it prints goes to ``printed`` beside the configuration.
    """
    printed = config.with_name("printed").open("w")
    process = subprocess.Popen(command(config), env=environment(), stdout=printed, stderr=printed)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            metrics = run_folder / "metrics.jsonl"
            if metrics.is_file() and any(line["step"] >= after_step for line in read_metrics(metrics)):
                break
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=100)
    finally:
        process.kill()


def test_a_whole_run_leaves_what_it_says(whole: Path) -> None:
    folder = whole / "run"
    assert sorted(p.name for p in folder.glob("step*")) == ["step12", "step4", "step8"]
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    start, *lines = read_metrics(folder / "metrics.jsonl")
    assert start.keys() == {"step", "eval/text/loss", "eval/text/perplexity"} and start["step"] == 0
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines[1:]:
        assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_gib", "eta_seconds"} <= line.keys()
    assert lines[-1]["eval/text/perplexity"] < start["eval/text/perplexity"]
    assert (folder / "config.yaml").is_file() and (folder / "train.log").stat().st_size > 0
    printed = (whole / "printed").read_text()
    assert "perplexity before" in printed and str(folder) in printed
    sizes = json.loads((folder / "plan.json").read_text())
    tied = {name: t for name, t in weights(folder / f"step{STEPS}").items() if "lm_head.w_out" not in name}
    assert sizes["parameters"] == sum(t.numel() for t in tied.values())
    assert sizes == plan(load_config(whole / "tiny.yaml")).sizes()
    if importlib.util.find_spec("plotly") is None:
        assert "no report: plotly" in printed
    else:
        assert all((folder / name).stat().st_size > 0 for name in FILES) and "could not" not in printed
    assert [f"saved {folder / f'step{n}'} in " in printed for n in (4, 8, 12)] == [True] * 3
    assert "Warning" not in printed and "torch.distributed" not in printed
    assert all(damage(p) is None for p in folder.glob("step*"))


def test_a_report_that_fails_is_logged(
    whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "write_report", lambda *_: 1 / 0)
    training._summarise(load_config(whole / "tiny.yaml"), STEPS, 1.0, None, complete=True)
    assert "the report could not be made" in caplog.text and "ZeroDivisionError" in caplog.text


def test_killed_and_resumed_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, eval=dict(on_start=True, on_finish=True), checkpoint=dict(interval=2, keep=2))
    assert start_and_signal(config, tmp_path / "run", 6, signal.SIGKILL) == -signal.SIGKILL
    resumed = run(config)
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stdout + resumed.stderr
    assert_same_weights(tmp_path / "run" / f"step{STEPS}", whole / "run" / f"step{STEPS}")
    assert losses(tmp_path) == losses(whole)
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(STEPS + 1))  # one line per step, though it was evaluated again when it resumed
    assert sorted(p.name for p in (tmp_path / "run").glob("*step*")) == ["step10", "step12"]  # those of both sessions


def test_sigterm_saves_and_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, eval=dict(on_start=True))
    assert start_and_signal(config, tmp_path / "run", 5, signal.SIGTERM) == 128 + signal.SIGTERM
    newest = find_resumable(str(tmp_path / "run"))
    assert newest is not None and newest.name not in ("step4", "step8", f"step{STEPS}"), (
        "the step it stopped at is saved"
    )
    printed = (tmp_path / "printed").read_text()
    assert f"SIGTERM: stopped at step {newest.name[4:]} of {STEPS}, saved in {newest}" in printed
    assert f"to continue: python {ROOT}/scripts/train.py {config}" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    metrics = summary["metrics"]
    assert 0 < summary["warm_up_seconds"] < summary["seconds"]
    assert (
        f"compiling and warming up took {summary['warm_up_seconds']:.1f} s"
        in (tmp_path / "run" / "train.log").read_text()
    )
    assert metrics["loss"][1] is not None and metrics["eval/text/loss"][1] is None  # validation is of step 0
    victim = max((newest / "model_and_optim").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    resumed = run(config)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{newest} cannot be used" in resumed.stdout and "have changed since it was saved" in resumed.stdout
    assert_same_weights(tmp_path / "run" / f"step{STEPS}", whole / "run" / f"step{STEPS}")


def test_a_half_written_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in ("step4", "step8", "step12"):
        shutil.copytree(whole / "run" / step, tmp_path / step)
    (tmp_path / "step12" / "checksums.json").unlink()
    (tmp_path / "step8" / ".metadata.json").unlink()
    assert find_resumable(str(tmp_path)) == tmp_path / "step4"
    assert "step12" in caplog.text and "step8" in caplog.text
    file = next((tmp_path / "step4" / "model_and_optim").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="train.save_folder: .*damaged ones only: step8, step4"):
        find_resumable(str(tmp_path))


def close(a: dict[int, float], b: dict[int, float]) -> None:
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], rel=2e-5), step


def test_changes_since_the_run_was_begun_are_told_and_other_data_is_refused(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shutil.copytree(whole / "run" / "step8", tmp_path / "run" / "step8")
    resumed = run(config, "optim.weight_decay=0.05")
    assert resumed.returncode == 0 and "optim.weight_decay: 0.1 -> 0.05" in resumed.stdout, resumed.stdout
    theirs = weights(whole / "run" / f"step{STEPS}")
    ours = weights(tmp_path / "run" / f"step{STEPS}")
    assert not torch.equal(ours["model.lm_head.w_out.weight"], theirs["model.lm_head.w_out.weight"])
    shutil.rmtree(tmp_path / "run" / f"step{STEPS}")
    make_text(tmp_path / "text", 20)
    refused = run(config)
    assert refused.returncode == 2 and "data: expected the data that the run" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_starting_from_the_weights_of_another_run(processes: int | None, whole: Path, tmp_path: Path) -> None:
    first = whole / "run" / "step8"
    shutil.copytree(first, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "train")  # weights alone will do
    options = ["train.max_steps=3", "optim.lr=1e-12", f"train.load_path={tmp_path / 'weights'}"]
    other = ["model.depth.read={recent: 3}", "train.load_other_reads=true"]  # a policy with the same parameters
    begun = run(write_config(tmp_path), *options, *other, processes=processes)
    assert begun.returncode == 0 and "starting from the weights of" in begun.stdout, begun.stdout + begun.stderr
    assert list(losses(tmp_path)) == [1, 2, 3]
    ours, theirs = weights(tmp_path / "run" / "step3"), weights(first)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    forged = shutil.copytree(tmp_path / "weights", tmp_path / "forged")
    (forged / "model_and_optim" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch harmed'\ntR.")
    (forged / "checksums.json").unlink()
    for bad, message in ((tmp_path, "train.load_path"), (forged, "a readable table of contents")):
        line = (f"train.load_path={bad}", f"train.save_folder={tmp_path / 'other'}")
        refused = run(write_config(tmp_path), *line, processes=processes)
        assert refused.returncode != 0 and message in refused.stderr, refused.stderr
        assert processes is not None or refused.returncode == 2
    assert not Path("harmed").exists()


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_auto_becomes_numbers_that_may_change(processes: int | None, whole: Path, tmp_path: Path) -> None:
    auto = {"train": {"microbatch_size": "auto"}, "parallel": {"activation_checkpointing": "auto"}}
    config = write_config(tmp_path, **auto)
    begun = run(config, "train.max_steps=4", processes=processes)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    saved = json.loads((tmp_path / "run" / "step4" / "config.json").read_text())
    assert saved["train"]["microbatch_size"] == 4 // (processes or 1)
    assert saved["parallel"]["activation_checkpointing"] == "none"
    assert "microbatch_size: auto" not in (tmp_path / "run" / "config.yaml").read_text()
    resumed = run(config, "train.max_steps=6", "train.microbatch_size=1", processes=processes)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"train.microbatch_size: {4 // (processes or 1)} -> 1" in resumed.stdout


def validated(folder: Path) -> dict[int, float]:
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return {line["step"]: line["eval/text/loss"] for line in lines if "eval/text/loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shared",
    [
        "parallel.prefetch=0",
        "parallel.tensor=2",
        "parallel.context=2",
        "parallel={pipeline: 2, activation_checkpointing: full}",
    ],
)
def test_two_processes_train_the_same_model(shared: str, whole: Path, tmp_path: Path) -> None:
    two, one_from_two, two_from_one = (tmp_path / n for n in ("two", "one_from_two", "two_from_one"))
    done = run(write_config(two, eval=dict(on_start=True, on_finish=True)), shared, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    close(losses(two), losses(whole))
    close(validated(two), validated(whole))
    ours, theirs, read = (
        weights(two / "run" / "step4"),
        weights(whole / "run" / "step4"),
        read_weights(two / "run" / "step4"),
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5)  # after 4 steps of up to 3e-3
        assert torch.equal(read[name.removeprefix("model.")], ours[name])
    for target, source, processes in ((one_from_two, two, None), (two_from_one, whole, 2)):
        config = write_config(target)
        shutil.copytree(source / "run" / "step8", target / "run" / "step8")
        resumed = run(config, *([] if processes is None else [shared]), processes=processes)
        assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stdout + resumed.stderr
        late = {step: loss for step, loss in losses(whole).items() if step > 8}
        close(losses(target), late)


def test_a_checkpoint_of_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shutil.copytree(whole / "run" / "step4", tmp_path / "run" / "step4")
    refused = run(config, "model.n_layers=2")
    assert refused.returncode == 2 and "model.n_layers: expected 3" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr


PARALLEL = {
    "ddp": ["parallel.data=ddp"],
    "hsdp": ["parallel.data=hsdp", "parallel.shard_degree=1"],
    "tensor": ["parallel.tensor=2", "model.depth=null"],
    "fsdp, value residual": ["model.depth.mechanism=value_residual"],
    "fsdp, denseformer": ["model.depth.mechanism=denseformer"],
    "fsdp, mhc": ["model.depth.mechanism=mhc"],
    "fsdp, mudd": ["model.depth.mechanism=mudd"],
    "fsdp, depth attention": ["model.depth.mechanism=depth_attention"],
    "fsdp, attention residuals": ["model.depth.mechanism=attention_residuals", "model.norm_placement=pre"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARALLEL)
def test_other_parallelism_from_the_command_line(kind: str, whole: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    done = run(config, *PARALLEL[kind], "train.max_steps=3", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    model = [override for override in PARALLEL[kind] if override.startswith("model.")]
    if model:
        one = tmp_path / "one"
        done = run(config, *model, "train.max_steps=3", f"train.save_folder={one / 'run'}")
        assert done.returncode == 0, done.stdout + done.stderr
        close(losses(tmp_path), losses(one))
    else:  # a shorter run has another schedule, but its first steps warm up alike
        close(losses(tmp_path), {step: loss for step, loss in losses(whole).items() if step <= 3})


def test_dry_run_prints_sizes_and_trains_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shown = run(config, "--dry-run", "train.max_steps=9")
    assert shown.returncode == 0, shown.stderr
    for text in ("norm_placement: post", "parameters", "training FLOPs per token", "memory per process", "steps"):
        assert text in shown.stdout
    assert not (tmp_path / "run").exists() and not (tmp_path / "work").exists()


def test_config_is_saved_beside_the_checkpoints(whole: Path) -> None:
    saved = json.loads((whole / "run" / "step4" / "config.json").read_text())
    assert saved["model"]["norm_placement"] == "post" and saved["train"]["max_steps"] == STEPS


def test_wandb_gets_the_names_of_the_metrics_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without wandb itself: what the callback hands to it."""
    from moda.train.callbacks import WandB

    logged: list[dict[str, float]] = []

    class Fake:
        def log(self, figures: dict[str, float], step: int) -> None:
            logged.append({**figures, "at": step})

    monkeypatch.setattr(WandB, "wandb", Fake())
    names = [
        "train/CE loss",
        "eval/lm/c4/CE loss",
        "eval/lm/c4/PPL",
        "eval/downstream/copa/accuracy",
        "throughput/device/BPS",
    ]
    WandB(name="x").log_metrics(3, {name: float(i) for i, name in enumerate(names)})
    assert logged == [
        {"loss": 0.0, "eval/c4/loss": 1.0, "eval/c4/perplexity": 2.0, "eval/downstream/copa/accuracy": 3.0,
         "throughput/device/BPS": 4.0, "at": 3}
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """One line says at which step; no checkpoint of that step or later is kept."""
    config = write_config(tmp_path, optim=dict(lr=1e25, warmup_steps=0), checkpoint=dict(interval=1))
    done = run(config)
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"error: training: expected a finite loss, got (nan|inf) at step 2 \(a smaller optim\.lr .*\)", error
    )
    assert [p.name for p in (tmp_path / "run").glob("step*")] == ["step1"]
    with pytest.raises(RuntimeError) as told:  # as OLMo-core has it where several processes train
        raise RuntimeError("An error occurred") from RuntimeError("nan loss encountered at step 2")
    assert str(training._diverged(told.value)) == error.removeprefix("error: ").replace(" inf ", " nan ")
    assert training._diverged(RuntimeError("An error occurred")) is None
