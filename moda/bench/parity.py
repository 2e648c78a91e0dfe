"""Do the fast backends train like the reference? One small model, the same data, 200 steps, every backend.

Truth is an fp32 run with the reference backend. Two bf16 runs with the reference backend, one of them from the start rounded to
bf16, say how far bf16 itself leads away from it: training magnifies a difference of the last bit, above all in a spike, so that
one run alone, or one seed, would be luck. ``fused`` and ``split`` may be at most twice as far from the truth
(:data:`moda_kernels.yardstick.FACTOR`), and so may their gradients, before anything is magnified.
"""

import argparse
import csv
import multiprocessing
import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number, require_gpu, results_option

STEPS, BATCH, LENGTH, LR = 200, 8, 256, 5e-4
BACKENDS = ("fused", "split")
#: Runs that differ from the truth by what bf16 does.
NOISE = ("reference", "reference, rounded start")
State = dict[str, torch.Tensor]


def _build(backend: str) -> Any:
    from moda.config.model import ModelConfig
    from moda.model import transformer_config
    from moda.typed import from_dict

    model = dict(
        d_model=256, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=64, ffn_hidden_size=512, vocab_size=256,
        norm_placement="post", depth={"mechanism": "moda"}, attention_backend=backend,
    )  # fmt: skip
    return transformer_config(from_dict(ModelConfig, model)).build(init_device="cuda")


def _start(seed: int) -> State:
    """A model's first parameters: OLMo-core's initialisation, its rows in an order that the seed gives."""
    model = _build("reference")
    model.init_weights(max_seq_len=LENGTH, device=torch.device("cuda"))
    order = torch.Generator().manual_seed(seed)
    return {
        name: p.detach()[torch.randperm(p.shape[0], generator=order).to(p.device)] if p.ndim > 1 else p.detach().clone()
        for name, p in model.named_parameters()
    }


class _Run:
    """A model, its optimizer and its batches: AdamW, 20 steps of warm-up, gradients clipped at 1."""

    def __init__(self, backend: str, dtype: torch.dtype, start: State, seed: int) -> None:
        self.dtype = dtype
        self.model = _build(backend)
        with torch.no_grad():
            for name, p in self.model.named_parameters():  # tied ones once
                p.copy_(start[name])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
        text = "\n".join(pydoc_data.topics.topics.values()).encode()
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self) -> torch.Tensor:
        """Of the next batch, differentiated."""
        starts = torch.randint(0, len(self.data) - LENGTH - 1, (BATCH,), generator=self.generator).tolist()
        batch = torch.stack([self.data[s : s + LENGTH + 1] for s in starts]).cuda()
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            out = self.model(batch[:, :-1].contiguous(), labels=batch[:, 1:].contiguous())
        out.loss.backward()
        return out.loss.detach()

    def train(self, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = LR * min(1.0, (step + 1) / 20)
            losses.append(self.loss())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [x.item() for x in losses]


def compare(seed: int) -> dict[str, list[float]]:
    """Losses of every step: ``fp32``, the two of :data:`NOISE`, and :data:`BACKENDS` in bf16."""
    start = _start(seed)
    runs = {"fp32": _Run("reference", torch.float32, start, seed).train(STEPS)}
    rounded = {name: p.bfloat16().float() for name, p in start.items()}
    for name, first in zip(NOISE, (start, rounded)):
        runs[name] = _Run("reference", torch.bfloat16, first, seed).train(STEPS)
    for backend in BACKENDS:
        runs[backend] = _Run(backend, torch.bfloat16, start, seed).train(STEPS)
    return runs


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square over the steps."""
    return (torch.tensor(a) - torch.tensor(b)).square().mean().sqrt().item()


def gradient_errors(seed: int, after: int) -> dict[str, float]:
    """Relative error of the whole model's gradient against fp32 after some fp32 steps, for each backend in bf16."""
    trained = _Run("reference", torch.float32, _start(seed), seed)
    trained.train(after)
    state = {name: p.detach().clone() for name, p in trained.model.named_parameters()}

    def gradient(backend: str, dtype: torch.dtype) -> torch.Tensor:
        run = _Run(backend, dtype, state, seed + 1)
        run.loss()
        return torch.cat([p.grad.double().flatten() for p in run.model.parameters() if p.grad is not None])

    truth = gradient("reference", torch.float32)
    gradients = {b: gradient(b, torch.bfloat16) for b in ("reference", *BACKENDS)}
    return {name: ((g - truth).norm() / truth.norm()).item() for name, g in gradients.items()}


def write_curves(out: Path, seeds: int) -> tuple[Path, Path]:
    """Run :func:`compare` for several seeds, a process each, and write the curves and their plot.

    :returns: the CSV and the plot.
    """
    with multiprocessing.get_context("spawn").Pool(seeds) as pool:
        curves = pool.map(compare, range(seeds))
    rows = [
        {"seed": seed, "step": step, **{name: f"{losses[step]:.6f}" for name, losses in runs.items()}}
        for seed, runs in enumerate(curves)
        for step in range(STEPS)
    ]
    path = results.write(out / "parity_200_steps.csv", rows)
    return path, draw(path)


def _read(path: Path) -> list[dict[str, list[float]]]:
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    names = ("fp32", *NOISE, *BACKENDS)
    seeds = sorted({int(r["seed"]) for r in rows})
    return [{n: [float(r[n]) for r in rows if int(r["seed"]) == s] for n in names} for s in seeds]


def draw(path: Path) -> Path:
    """The plot of a CSV of :func:`write_curves`: the first seed's losses, and every seed's distances from fp32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = _read(path)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for name, losses in curves[0].items():
        left.plot(losses, label=name, linewidth=1.0, linestyle="--" if name in NOISE else "-")
    left.set(xlabel="step", ylabel="loss", title="seed 0")
    left.legend()
    names: Iterable[str] = (*NOISE, *BACKENDS)
    for seed, runs in enumerate(curves):
        right.plot([distance(runs[n], runs["fp32"]) for n in names], "o", label=f"seed {seed}", alpha=0.8)
    right.set_xticks(range(4), ["reference", "reference,\nrounded start", *BACKENDS])
    right.set(ylabel="rms difference of the losses from fp32", ylim=(0, None), title="all in bf16")
    right.legend()
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)
    parser.add_argument("--seeds", type=number(int, 1), default=5, help="runs, all at once")


def _run(args: argparse.Namespace) -> None:
    require_gpu()
    for path in write_curves(args.out, args.seeds):
        print(path)


BENCHMARK = Benchmark("parity", "200 training steps of a small model with every backend", _add_options, _run)
