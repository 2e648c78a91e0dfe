"""How training speed scales over the GPUs of this machine: weak and strong, under FSDP2 and under HSDP.

Every point is whole steps under torchrun, as `step` measures them on one process. Weak scaling gives each GPU the same work, as
many microbatches as --microbatches says; strong scaling splits the step of the largest number of GPUs. All points of a run have
the microbatch that the first one has. `over_first` is tokens/s per GPU over that of the first point of its series in the run.
Points that the file has from earlier runs stay, so that a table can be measured in parts: --gpus, --series, --replicas, and then
with a number for train.microbatch_size.
"""

import argparse
import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moda.errors import UserError
from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number, results_option

from .step import add_point_options, line

TABLE = "table_scaling.csv"
KEY = ("config", "overrides", "series", "gpus", "replicas", "gpu")
SERIES = ("weak", "strong")


def series_points(
    base: Any, gpus: list[int], replicas: list[int], series: list[str]
) -> Iterator[tuple[list[str], Any]]:
    """Points, each with the series that it belongs to: the largest number of GPUs is the same point in both.

    :param base: a :class:`.point.Point` for one GPU.
    :param replicas: copies of the model: 1 for FSDP2, others for HSDP with at least two GPUs to a copy.
    """
    most = max(gpus)
    for copies in replicas:
        for n in gpus:
            if n % copies or (copies > 1 and n < 2 * copies):
                continue
            point = dataclasses.replace(base, gpus=n, replicas=copies)
            if n == most:
                yield series, point
                continue
            if "weak" in series:
                yield ["weak"], point
            if "strong" in series and base.microbatches * most % n == 0:
                yield ["strong"], dataclasses.replace(point, microbatches=base.microbatches * most // n)


def _same_microbatch(point: Any, first: dict[str, Any] | None) -> Any:
    """What ``auto`` was for the first point, whose GPUs hold most of the model each, for every other one."""
    if first is None:
        return point
    settings = {
        "train.microbatch_size": first["microbatch"],
        "parallel.activation_checkpointing": first["checkpointing"],
    }
    chosen = [f"{key}={value}" for key, value in settings.items()]
    kept = [word for word in point.overrides if word.split("=")[0] not in settings]
    return dataclasses.replace(point, overrides=[*kept, *chosen])


def scaling_table(
    base: Any, gpus: list[int], replicas: list[int], series: list[str], timeout: float = 240.0
) -> Iterator[list[dict[str, Any]]]:
    """Measure point after point; gives all rows so far each time.

    A point that does not run is a row that says why. Communication is blank where nothing was profiled.
    """
    from .point import measure

    rows: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    for names, point in series_points(base, gpus, replicas, series):
        row = measure(_same_microbatch(point, first), timeout)
        if row["status"] == "ok" and first is None:
            first = row
        row["overrides"] = " ".join(base.overrides)
        print(
            f"{row['config']} {'+'.join(names)}, {point.gpus} GPUs, {point.replicas} replicas: {line(row)}", flush=True
        )
        rows += [{"series": name, **row, "over_first": ""} for name in names]
        for one in rows:
            start = next((r for r in rows if r["series"] == one["series"] and r["status"] == "ok"), None)
            if start is not None and one["status"] == "ok":
                ratio = one["tokens_per_second_per_gpu"] / max(1, start["tokens_per_second_per_gpu"])
                one["over_first"] = round(ratio, 4)
        yield rows


def draw(path: Path) -> Path:
    """The plot of a table: tokens per second per GPU over GPUs, a panel for each configuration, beside exposed communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open(newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["status"] == "ok"]
    configs = sorted({row["config"] for row in rows})
    size = (5 * max(1, len(configs)), 7)
    figure, axes = pyplot.subplots(2, max(1, len(configs)), figsize=size, squeeze=False, layout="constrained")
    for (above, below), config in zip(axes.T, configs):
        lines: dict[tuple[str, str, str], list[dict[str, str]]] = {}
        for row in sorted(rows, key=lambda row: int(row["gpus"])):
            if row["config"] == config:
                lines.setdefault((row["series"], row["replicas"], row["overrides"]), []).append(row)
        for (series, copies, overrides), points in lines.items():
            kind = "FSDP2" if copies == "1" else f"HSDP, {copies} replicas"
            label = f"{series}, {kind} {overrides}".rstrip()
            style = "o-" if series == "weak" else "s--"
            x = [int(p["gpus"]) for p in points]
            above.plot(x, [float(p["tokens_per_second_per_gpu"]) for p in points], style, label=label, ms=4)
            exposed = [(n, float(p["communication_ms"])) for n, p in zip(x, points) if p["communication_ms"]]
            if exposed:
                below.plot(*zip(*exposed), style, label=label, ms=4)
        ticks = sorted({int(row["gpus"]) for row in rows})
        for ax in (above, below):
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(n) for n in ticks])
            ax.set_ylim(0, None)
            ax.set_xlabel("GPUs")
        above.set(title=config, ylabel="tokens/s per GPU")
        below.set(ylabel="exposed communication, ms per step")
        above.legend(fontsize="small")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _integers(text: str) -> list[int]:
    read = number(int, 1)
    return sorted({read(word) for word in text.split(",")})


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/moda_700m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key: parallel.prefetch=1")
    parser.add_argument("--gpus", type=_integers, default=[1, 2, 4, 8], metavar="N,N", help="default: 1,2,4,8")
    parser.add_argument(
        "--replicas", type=_integers, default=[1, 2, 4], metavar="N,N",
        help="copies of the model: 1 is FSDP2, more are HSDP (default: 1,2,4)",
    )  # fmt: skip
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES), help="default: both")
    add_point_options(parser)


def _run(args: argparse.Namespace) -> None:
    from moda.config import load_config

    from .point import Point

    load_config(args.config, args.overrides)
    base = Point(
        args.config, args.overrides, microbatches=args.microbatches, steps=args.steps, profile=True, tokens=args.tokens
    )
    if not list(series_points(base, args.gpus, args.replicas, args.series)):
        raise UserError("--replicas", "a divisor of --gpus, with two GPUs or more to each", args.replicas)
    where = results.provenance()
    path = args.out / TABLE
    for rows in scaling_table(base, args.gpus, args.replicas, args.series, args.timeout):
        results.merge(path, rows, KEY, where)
    print(path)
    print(draw(path))


BENCHMARK = Benchmark("scaling", "training speed over the number of GPUs, FSDP2 and HSDP", _add_options, _run)
