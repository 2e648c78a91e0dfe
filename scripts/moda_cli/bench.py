"""Benchmarks; NAME --help says what each measures."""

import argparse
from pathlib import Path

from moda_kernels.benchmarks import registry

MODULES = (
    "moda_kernels.benchmarks.kernels",
    "moda.bench.training",
    "moda.bench.parity",
    "moda.bench.data",
    "moda_evals.benchmark",
)
ROOT = Path(__file__).resolve().parents[2]


def parser() -> argparse.ArgumentParser:
    """The command line, with one subcommand per benchmark."""
    return registry.build_parser(MODULES, ROOT)


def run(args: argparse.Namespace) -> int:
    return registry.run(args)
