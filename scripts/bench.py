"""Benchmarks. ``python scripts/bench.py kernels --table 2`` measures the operator; see ``--help``."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser("kernels", help="the operator: tables of the paper, siblings, a training step")
    kernels.add_argument("--table", required=True, choices=("2", "7", "siblings", "training"), help="what to measure")
    kernels.add_argument("--out", type=Path, default=ROOT / "kernels" / "results", help="folder of CSV files and plots")
    kernels.add_argument("--variants", nargs="+", metavar="NAME", help="measure these variants only")
    kernels.add_argument("--only", metavar="TEXT", help="measure the cases whose name contains TEXT")
    kernels.add_argument("--jobs", type=int, default=0, help="processes that compile beforehand (0: none)")
    kernels.add_argument("--budget-ms", type=float, default=150.0, help="time of each measurement's repetitions")
    kernels.add_argument("--plot-only", action="store_true", help="draw the plots of an existing CSV")
    parity = commands.add_parser("parity", help="200 training steps of a small model with every backend")
    parity.add_argument("--out", type=Path, default=ROOT / "kernels" / "results", help="folder of the CSV and the plot")
    parity.add_argument("--seeds", type=int, default=5, help="runs, all at once")
    arguments = parser.parse_args()
    if arguments.command == "parity":
        return _parity(arguments.out, arguments.seeds)
    if arguments.table == "training":
        return _training(arguments.out)
    return _kernels(arguments)


def _kernels(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from moda_kernels.benchmarks.plots import draw_sweeps

    console = Console(soft_wrap=True, highlight=False)
    if not arguments.plot_only:
        if not torch.cuda.is_available():
            console.print("bench: a CUDA device is needed (--plot-only draws from an existing CSV)")
            return 2
        from moda_kernels.benchmarks.runner import run_table
        from moda_kernels.benchmarks.variants import VARIANTS

        run_table(
            arguments.table, arguments.out, arguments.variants or tuple(VARIANTS), arguments.jobs, arguments.only,
            arguments.budget_ms, progress=console.print,
        )  # fmt: skip
    for path in draw_sweeps(arguments.out / f"table_{arguments.table}.csv"):
        console.print(f"plot: {path}")
    return 0


def _parity(out: Path, seeds: int) -> int:
    import torch
    from rich.console import Console

    from moda.backend_parity import write_curves
    from moda_kernels.benchmarks.runner import environment

    console = Console(soft_wrap=True, highlight=False)
    if not torch.cuda.is_available():
        console.print("bench: a CUDA device is needed")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for path in write_curves(out, seeds, environment()):
        console.print(str(path))
    return 0


def _training(out: Path) -> int:
    """A training step of whole models; the first is the baseline that the others are divided by."""
    from rich.console import Console

    from moda.benchmark import training_table
    from moda_kernels.benchmarks.runner import environment

    console = Console(soft_wrap=True, highlight=False)
    steps = training_table()
    where = environment()
    rows = [
        {
            "model": s.name,
            "params": s.params,
            "median_ms": round(s.quantile(0.5), 3),
            "p20_ms": round(s.quantile(0.2), 3),
            "p80_ms": round(s.quantile(0.8), 3),
            "tokens_per_second": round(s.tokens_per_second),
            "over_baseline": round(s.tokens_per_second / steps[0].tokens_per_second, 4),
            "peak_gib": round(s.peak_bytes / 2**30, 2),
            **where,
        }
        for s in steps
    ]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table_training.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for step in steps:
        speed = step.tokens_per_second
        ratio = speed / steps[0].tokens_per_second
        console.print(f"{step.name:28s} {step.quantile(0.5):9.2f} ms {speed:8.0f} tokens/s {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
