"""Speed and ETA: over a window of steps, without what happens between them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moda.train.callbacks import SpeedCallback, between_steps
from moda.train.progress import _ETA, ProgressCallback


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def test_speed_is_a_mean_over_the_last_steps_without_the_time_between_them(clock: Any) -> None:
    recorded: dict[str, float] = {}
    speed = SpeedCallback(num_flops_per_token=10, device_peak_flops_per_second=10_000)
    progress = ProgressCallback(total_steps=100)
    trainer: Any = SimpleNamespace(
        device=torch.device("cpu"), global_train_tokens_seen=None, global_train_petaflops=0.0, train_module=None,
        dp_process_group=None, record_metric=lambda name, value, **_: recorded.__setitem__(name, value),
        callbacks={"speed": speed, "progress": progress},
    )  # fmt: skip
    speed.trainer = progress.trainer = trainer

    def step(seconds: float) -> None:
        speed.pre_load_batch()
        speed.pre_step({"input_ids": torch.zeros(2, 64)})
        clock.seconds += seconds
        speed.post_step()

    speed.pre_train()
    step(60)  # compiles
    assert speed.pace is None and "throughput/device/TPS" not in recorded
    for seconds in (1, 3) * 10:
        step(seconds)
    assert speed.pace == pytest.approx(2)
    assert recorded["throughput/device/TPS"] == pytest.approx(64)
    assert recorded["throughput/device/MFU"] == pytest.approx(100 * 640 / 10_000)
    with between_steps(trainer):
        clock.seconds += 500
    step(2)
    assert speed.pace == pytest.approx((19 * 2 + 3) / 20)  # the oldest step, of one second, has left the window
    assert recorded["throughput/device/TPS (actual avg)"] == pytest.approx(64)
    for _ in range(400):
        step(0.1)
    assert speed.pace == pytest.approx(0.1)  # thirty seconds of short steps are more than twenty of them
    assert progress._eta(40) == pytest.approx(6)


def test_the_eta_counts_down_between_steps(clock: Any) -> None:
    task: Any = SimpleNamespace(fields={"end": clock.seconds + 75})
    assert _ETA().render(task).plain == "ETA 01:15"
    clock.seconds += 70
    assert _ETA().render(task).plain == "ETA 00:05"
    clock.seconds += 70
    assert _ETA().render(task).plain == "ETA 00:00"
