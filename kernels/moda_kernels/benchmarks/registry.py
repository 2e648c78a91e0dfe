"""Benchmarks by name: one file each, whose ``BENCHMARK`` says what it is called, its options, and how it runs."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


class NotMeasured(Exception):
    """Why a benchmark cannot run here, to be shown without a traceback."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    :param name: its name on the command line.
    :param help: one line for ``--help``.
    :param add_options: adds its options to a parser; the second argument is the root of the checkout.
    :param run: measures, prints and writes. Prints what it wrote.
    """

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser, Path], None]
    run: Callable[[argparse.Namespace], None]


def build_parser(modules: Iterable[str], root: Path) -> argparse.ArgumentParser:
    """A command line with one subcommand per benchmark.

    :param modules: full names of the modules, each with a ``BENCHMARK``.
    :param root: the checkout, where ``docs/benchmarks`` and ``configs`` are looked for.
    """
    parser = argparse.ArgumentParser(
        description="Measure, and write the figures with where they were measured to a CSV."
    )
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for module in map(import_module, modules):
        benchmark: Benchmark = module.BENCHMARK
        command = commands.add_parser(
            benchmark.name,
            help=benchmark.help,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_options(command, root)
        command.set_defaults(benchmark=benchmark)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that :func:`build_parser`'s parser chose; returns the exit code."""
    try:
        args.benchmark.run(args)
    except NotMeasured as reason:
        print(f"bench: {reason}")
        return 2
    return 0


def results_option(parser: argparse.ArgumentParser, root: Path) -> None:
    """Add ``--out``, the folder of results: ``docs/benchmarks`` of a checkout, else the current one."""
    committed = root / "docs" / "benchmarks"
    default = committed if committed.is_dir() else Path()
    parser.add_argument(
        "--out", type=Path, default=default, help="folder of CSV files and plots (default: %(default)s)"
    )


def number(kind: type, least: float, above: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a number of at least ``least``, or above it."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (least < value if above else least <= value) or value == float("inf"):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {noun} {'>' if above else '>='} {least}, got {text}")
        return value

    return convert


def require_gpu() -> None:
    """:raises NotMeasured: without a GPU."""
    if not torch.cuda.is_available():
        raise NotMeasured("a CUDA device is needed")
