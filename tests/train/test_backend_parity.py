"""The fast backends train like the reference: losses of 200 steps, and gradients before training magnifies a difference."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from moda.bench.parity import BACKENDS, NOISE, compare, distance, draw, gradient_errors
from moda_kernels.yardstick import FACTOR

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_losses_agree_within_bf16_noise() -> None:
    """The median over three seeds: a run with a spike magnifies the last bit, whichever backend it comes from."""
    over: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for seed in range(3):
        runs = compare(seed)
        assert runs["fp32"][-1] < 0.6 * runs["fp32"][0], "the run learns"
        noise = max(distance(runs[name], runs["fp32"]) for name in NOISE)
        for backend in BACKENDS:
            over[backend].append(distance(runs[backend], runs["fp32"]) / noise)
    assert all(statistics.median(found) <= FACTOR for found in over.values()), over


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("after", [0, 100], ids=lambda n: f"step{n}")
def test_gradients_are_as_exact_as_the_reference(after: int) -> None:
    errors = gradient_errors(0, after)
    assert all(errors[backend] <= FACTOR * errors["reference"] for backend in BACKENDS), errors


def test_plot_is_drawn_from_the_curves_alone(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    names = ("fp32", *NOISE, *BACKENDS)
    lines = ['seed,step,fp32,reference,"reference, rounded start",fused,split']
    lines += [
        f"{seed},{step}," + ",".join(str(5 - step + 0.01 * i) for i in range(5)) for seed in (0, 1) for step in (0, 1)
    ]
    assert len(names) == 5
    path.write_text("\n".join(lines) + "\n")
    assert draw(path).stat().st_size > 1000
