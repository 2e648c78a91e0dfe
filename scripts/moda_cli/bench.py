"""Benchmarks; NAME --help says what each measures."""

import argparse
from pathlib import Path

from moda.files import check_writable
from moda_kernels.benchmarks import registry

MODULES = (
    "moda_kernels.benchmarks.kernels",
    "moda_kernels.benchmarks.tiles",
    "moda_kernels.benchmarks.sources",
    "moda.bench.step",
    "moda.bench.scaling",
    "moda.bench.training",
    "moda.bench.loss",
    "moda.bench.memory",
    "moda.bench.parity",
    "moda.bench.data",
    "moda_evals.benchmark",
)
ROOT = Path(__file__).resolve().parents[2]


def parser() -> argparse.ArgumentParser:
    """The command line, with one subcommand per benchmark."""
    return registry.build_parser(MODULES, ROOT)


def run(args: argparse.Namespace) -> int:
    for name in ("out", "output"):
        if given := getattr(args, name, None):
            path = Path(given)
            check_writable(f"--{name}", path if path.suffix else path / "results.csv")
    return registry.run(args)
