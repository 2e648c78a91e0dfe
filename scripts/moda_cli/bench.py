"""Benchmarks: ``bench.py NAME``; ``bench.py NAME --help`` says what it measures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moda.errors import UserError
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
    """Run the chosen benchmark and return the exit code."""
    try:
        return registry.run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    return run(parser().parse_args(argv))
