"""What a run would take on more GPUs than were measured: computed from one GPU's speed and the speed of links.

A step of a GPU is M microbatches of computation, ``t`` each, of which a third is forward, and what of its communication nothing
hides. With P parameters, n GPUs that share a copy of the model, r copies, and P' parameters outside of the blocks:

* each microbatch gathers the parameters in bf16, forward and again backward: ``2 P (n - 1) / n`` bytes each time,
* and reduces the gradients in fp32: ``4 P (n - 1) / n`` bytes, in the backward pass;
* the last one also adds up the gradients of all copies: ``2 (r - 1) / r * 4 P / n`` bytes.

A collective of GPUs of one host takes its bytes over ``in_host``; one across hosts, of one GPU of each, over ``between``. What
exceeds the computation beside it is exposed, and so is what has none beside it: the first gathering of P' and its last reduction.
Left out: start-up times of messages, the SMs that NCCL takes from matrix products, the optimizer (28 bytes of traffic per
parameter and shard), data, evaluation, checkpoints and hosts that fail.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moda.config import load_config
from moda.files import write_text
from moda.train.memory import a_gpu, estimate_memory
from moda.train.plan import Plan, make_plan

#: GPUs of a host, the memory of each in GiB, and its dense bf16 FLOP/s.
HOST, MEMORY, PEAK = 8, 80.0, 989e12
GPUS = (8, 64, 256, 1024)
#: Configuration -> the row of table_training.csv whose share of the peak it is given, and the configuration of that row.
MODELS = {
    "moda_700m": ("MoDA 36 layers, FFN KV", "moda_700m"),
    "moda_1.5b": ("MoDA 36 layers, FFN KV", "moda_700m"),
}
BEGIN, END = "<!-- computed by moda.bench.projection -->", "<!-- end -->"


@dataclass(frozen=True)
class Links:
    """Bytes per second of a GPU in one direction, and the share of it that collectives reach.

    :param in_host: NVLink of an H100 or H200. :param between: a network card of 400 Gb/s for each GPU.
    """

    in_host: float = 450e9
    between: float = 50e9
    reached: float = 0.8


@dataclass(frozen=True)
class Projection:
    """One row. Seconds are those of a step, bytes those that a GPU sends in it."""

    plan: Plan
    compute: float
    in_host: float
    between: float
    exposed: float

    @property
    def tokens_per_second(self) -> float:
        return self.plan.config.train.tokens_per_step / (self.compute + self.exposed)

    @property
    def mfu(self) -> float:
        return self.tokens_per_second * self.plan.flops_per_token / self.plan.world_size / PEAK

    @property
    def days(self) -> float:
        return self.plan.steps * (self.compute + self.exposed) / 86400


def project(plan: Plan, speed: float, links: Links | None = None) -> Projection:
    """A run with one copy of the model to a host, FSDP2 within it.

    :param speed: tokens per second of one GPU, forward and backward.
    """
    links = links or Links()
    c, t = plan.config, plan.transformer
    world, share = plan.world_size, c.parallel.shard_degree or plan.world_size
    assert share <= HOST and c.parallel.tensor == 1
    copies = world // share
    compute = c.train.tokens_per_step / world / speed
    microbatches = c.train.global_batch_size // (c.train.microbatch * world)
    params = float(t.num_params)
    outside = t.d_model * t.vocab_size * (1 if t.tie_word_embeddings else 2) / params

    gathered, reduced = (size * params * (share - 1) / share for size in (2, 4))
    added = 2 * (copies - 1) / copies * 4 * params / share
    gather, reduce = (n / links.in_host / links.reached for n in (gathered, reduced))
    add = added / links.between / links.reached
    forward = compute / microbatches / 3
    exposed = microbatches * (outside * gather + max(0.0, gather - forward))
    exposed += microbatches * (outside * reduce + max(0.0, gather + reduce - 2 * forward))
    exposed += outside * add + max(0.0, add - max(2 * forward, gather + reduce))
    return Projection(plan, compute, microbatches * (2 * gathered + reduced), added, exposed)


def speeds(table: Path, configs: Path) -> dict[str, float]:
    """Tokens per second of one GPU for each model: measured, or with the share of the peak that another one reached."""
    with table.open(newline="", encoding="utf-8") as f:
        measured = {row["model"]: float(row["tokens_per_second"]) for row in csv.DictReader(f)}
    flops = {name: _plan(configs / f"{name}.yaml", HOST).flops_per_token for name in MODELS}
    return {name: measured[row] * flops[of] / flops[name] for name, (row, of) in MODELS.items()}


def _plan(config: Path, gpus: int) -> Plan:
    overrides = [] if gpus <= HOST else ["parallel.data=hsdp", f"parallel.shard_degree={HOST}"]
    return make_plan(load_config(config, overrides), gpus, a_gpu(MEMORY))


def lines(table: Path, configs: Path) -> Iterator[str]:
    """The page's table, in Markdown."""
    yield (
        "| model | GPUs | sharding | microbatch x steps of it | memory per GPU (GiB) | sent per step and GPU, in the host / "
        "between hosts (GB) | step (ms) | of it exposed | tokens/s | MFU | days for 400B tokens |"
    )
    yield "|" + "---|" * 11
    for name, speed in speeds(table, configs).items():
        for gpus in GPUS:
            p = project(_plan(configs / f"{name}.yaml", gpus), speed)
            train = p.plan.config.train
            sharding = "FSDP2" if gpus <= HOST else f"HSDP, {HOST} x {gpus // HOST}"
            step = p.compute + p.exposed
            cells = (
                name, f"{gpus:,}", sharding, f"{train.microbatch} x {train.global_batch_size // train.microbatch // gpus}",
                f"{sum(estimate_memory(p.plan).values()) / 2**30:.1f}", f"{p.in_host / 1e9:.1f} / {p.between / 1e9:.2f}",
                f"{1e3 * step:,.0f}", f"{p.exposed / step:.1%}", f"{p.tokens_per_second:,.0f}", f"{p.mfu:.1%}",
                f"{p.days:,.2f}",
            )  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def update(page: Path) -> str:
    """The page with its table computed anew, from the other files of its clone."""
    root = page.resolve().parents[1]
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table = "\n".join(lines(root / "docs" / "benchmarks" / "table_training.csv", root / "configs"))
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), update(Path(sys.argv[1])))
