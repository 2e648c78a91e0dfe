"""The memory estimate against the measured peak: a few whole steps of a configuration, as ``train`` makes them, random tokens.

Each case runs in a process of its own; a step is two microbatches, clipping and the optimizer. ``estimate_gib`` is what
`moda plan` prints, ``measured_gib`` the peak of what PyTorch's allocator gave out, ``reserved_gib`` of what it held.
"""

import argparse
import contextlib
import multiprocessing
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moda.errors import UserError
from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number, require_gpu, results_option
from moda_kernels.benchmarks.timing import quantiles, seconds

#: Configuration and overrides.
CASES = (
    "olmo2_700m.yaml train.microbatch_size=4",
    "moda_700m.yaml train.microbatch_size=4",
    "olmo2_700m.yaml train.microbatch_size=8",
    "moda_700m.yaml train.microbatch_size=8",
    "moda_700m.yaml train.microbatch_size=8 'model.depth.read={recent: 16}'",
    "moda_700m.yaml train.microbatch_size=8 parallel.activation_checkpointing=full",
    "olmo2_1.5b.yaml train.microbatch_size=2",
    "moda_1.5b.yaml train.microbatch_size=2",
    "moda_1.5b.yaml train.microbatch_size=4 parallel.activation_checkpointing=full",
)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def peak_of(config: Path, overrides: list[str], steps: int = 4) -> dict[str, Any]:
    """One row: estimate and measured peak in this process, which must not have used the GPU before."""
    from olmo_core.train import teardown_training_environment
    from olmo_core.utils import get_default_device

    from moda.config import load_config
    from moda.train.build import build_train_module
    from moda.train.environment import prepare_environment
    from moda.train.memory import estimate_memory, this_machine
    from moda.train.plan import make_plan

    plan = make_plan(load_config(config, overrides), 1, this_machine())
    c, parts = plan.config, estimate_memory(plan)
    row: dict[str, Any] = {
        "config": config.stem, "overrides": shlex.join(overrides), "microbatch": c.train.microbatch,
        "checkpointing": c.parallel.activation_checkpointing.value, "status": "ok",
        "estimate_gib": round(sum(parts.values()) / 2**30, 2), "measured_gib": "", "over_measured": "", "reserved_gib": "",
        "step_ms": "", "parts_gib": "; ".join(f"{name} {n / 2**30:.2f}" for name, n in parts.items()),
    }  # fmt: skip
    prepare_environment(c.train.seed)
    try:
        device = get_default_device()
        module: Any = build_train_module(plan, device)
        module._attach_trainer(SimpleNamespace(record_metric=_nothing, record_ce_loss=_nothing))
        module.scheduler = None
        shape = (2 * c.train.microbatch, c.train.sequence_length)
        ids = torch.randint(0, plan.tokenizer.config.vocab_size, shape, device=device)

        def step() -> None:
            module.zero_grads()
            module.train_batch({"input_ids": ids})
            module.optim_step()

        row["step_ms"] = round(quantiles([1e3 * seconds(step) for _ in range(steps)][1:]).median, 1)
        if device.type == "cuda":
            measured = torch.cuda.max_memory_allocated()
            row |= {
                "measured_gib": round(measured / 2**30, 2),
                "over_measured": round(sum(parts.values()) / measured, 4),
                "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            }
    except torch.OutOfMemoryError as e:
        row["status"] = f"out of memory: {e}".splitlines()[0].split(". GPU")[0]
    finally:
        teardown_training_environment()
    return row


def _in_process(case: str, configs: Path, steps: int) -> dict[str, Any]:
    file, *overrides = shlex.split(case)
    return peak_of(configs / file, overrides, steps)


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)
    parser.add_argument(
        "--configs", type=Path, default=root / "configs", help="folder of CASE's files (default: %(default)s)"
    )
    parser.add_argument("--steps", type=number(int, 2), default=4, help="default: %(default)s")
    about = "a file of --configs with overrides, in quotes; all of the table by default"
    parser.add_argument("cases", nargs="*", metavar="CASE", help=about)


def _run(args: argparse.Namespace) -> None:
    require_gpu()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train does
    where, rows = results.provenance(), []
    for case in args.cases or CASES:
        if not (args.configs / case.split()[0]).is_file():
            raise UserError("--configs", f"a folder with {case.split()[0]}", str(args.configs))
        with contextlib.closing(multiprocessing.get_context("spawn").Pool(1)) as pool:
            row = pool.apply(_in_process, (case, args.configs, args.steps))
        print(
            f"{case}: estimate {row['estimate_gib']} GiB, measured {row['measured_gib']}, {row['status']}", flush=True
        )
        rows.append(row)
        results.write(args.out / "table_memory.csv", rows, where)
    print(args.out / "table_memory.csv")


BENCHMARK = Benchmark("memory", "peak memory of training against its estimate", _add_options, _run)
