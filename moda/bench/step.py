"""Whole training steps: data, forward, backward, clipping, optimizer and FSDP2, through the trainer that `moda train` runs.

Each configuration trains some steps on random tokens, or on --tokens, in processes of its own. One without model.depth is
measured again as OLMo-core trains it: its own attention, its loss from logits, FSDP2 for one process too. --profile says what
the time goes into, by kernel names (moda/bench/breakdown.py).
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number, require_gpu, results_option

TABLE = "table_step.csv"
KEY = ("config", "overrides", "variant", "gpus", "gpu")
DEFAULT = ("olmo2_700m.yaml", "moda_700m.yaml")


def add_point_options(parser: argparse.ArgumentParser) -> None:
    """What :mod:`.scaling` takes as well."""
    parser.add_argument("--steps", type=number(int, 2), default=10, help="that are timed (default: %(default)s)")
    parser.add_argument(
        "--microbatches", type=number(int, 1), default=2, metavar="N",
        help="of each process in a step (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tokens", nargs="+", metavar="FILE", help="token files to train on, globs allowed")
    parser.add_argument(
        "--timeout", type=number(float, 1), default=240.0, metavar="SECONDS",
        help="for one measurement; what takes longer has failed (default: %(default)s)",
    )  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if row["status"] != "ok":
        return row["status"]
    mfu, peak = (row[name] if row[name] != "" else "-" for name in ("mfu_percent", "peak_gib"))
    steps = f"{row['step_ms']:.1f} ms ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
    return f"{row['tokens_per_second']:,} tokens/s, MFU {mfu} %, step {steps}, {peak} GiB, first step {row['first_step_s']} s"


def shares(row: dict[str, Any]) -> str:
    """Where a profiled step's time goes, largest first."""
    from .breakdown import KINDS

    parts = {kind: row[f"{kind}_ms"] for kind in (*KINDS, "gaps") if row[f"{kind}_ms"] not in ("", 0.0)}
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{kind.replace('_', ' ')} {ms:.1f} ms ({ms / row['step_ms']:.1%})" for kind, ms in ordered)


def step_table(points: list[Any], rounds: int = 1, timeout: float = 240.0) -> list[dict[str, Any]]:
    """Measure points ``rounds`` times over, in turns: a GPU's clock changes under load.

    :returns: their rows, of the round in the middle, with tokens per second over those of the first one that is OLMo-core's own.
    """
    from .point import OLMO_CORE, measure

    measured: list[list[dict[str, Any]]] = [[] for _ in points]
    for _ in range(rounds):
        for point, taken in zip(points, measured):
            taken.append(measure(point, timeout))
            print(f"{taken[-1]['config']} {point.variant}: {line(taken[-1])}", flush=True)
            if taken[-1]["gaps_ms"] != "":
                print(f"  {shares(taken[-1])}", flush=True)
    rows = []
    for taken in measured:
        ok = sorted((row for row in taken if row["status"] == "ok"), key=lambda row: row["step_ms"])
        rows.append(ok[len(ok) // 2] if len(ok) == rounds else next(row for row in taken if row["status"] != "ok"))
    base = next((r["tokens_per_second"] for r in rows if r["variant"] == OLMO_CORE and r["status"] == "ok"), None)
    for row in rows:
        ratio = "" if base is None or row["status"] != "ok" else round(row["tokens_per_second"] / base, 4)
        row["over_olmo_core"] = ratio
    return rows


def points_of(args: argparse.Namespace, root: Path) -> list[Any]:
    """What the arguments ask for.

    :raises UserError: for configurations that cannot be read.
    """
    from moda.config import load_config

    from .point import OLMO_CORE, Point

    overrides = [word for word in args.configs if "=" in word]
    files = [word for word in args.configs if "=" not in word] or [str(root / "configs" / name) for name in DEFAULT]
    points = []
    for file in files:
        config = load_config(file, overrides)
        point = Point(
            file, overrides, gpus=args.gpus, microbatches=args.microbatches, steps=args.steps, profile=args.profile,
            tokens=args.tokens,
        )  # fmt: skip
        if config.model.depth is None and config.parallel.tensor == 1:
            points.append(dataclasses.replace(point, variant=OLMO_CORE))
        points.append(point)
    return points


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)
    parser.add_argument(
        "configs",
        nargs="*",
        metavar="CONFIG",
        help="YAML files, and key=value for all of them (default: the 700M pair)",
    )
    parser.add_argument("--gpus", type=number(int, 1), default=1, metavar="N", help="processes (default: %(default)s)")
    add_point_options(parser)
    parser.add_argument("--rounds", type=number(int, 1), default=1, help="times over, in turns (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="say what the time goes into, on GPUs")
    parser.set_defaults(root=root)


def _run(args: argparse.Namespace) -> None:
    if all("=" in word for word in args.configs):  # the 700M pair
        require_gpu()
    where = results.provenance()
    rows = step_table(points_of(args, args.root), args.rounds, args.timeout)
    for row in rows:
        ratio = row["over_olmo_core"]
        print(
            f"{row['config']:20s} {row['variant']:10s} {line(row)}" + (f", {ratio:.3f} of OLMo-core" if ratio else "")
        )
    print(results.merge(args.out / TABLE, rows, KEY, where))


BENCHMARK = Benchmark("step", "whole training steps of configurations, against OLMo-core's own", _add_options, _run)
