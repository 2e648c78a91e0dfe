"""The operator on the paper's tables 2 and 7 and on siblings of it: compile in parallel, gate, time, one CSV per table.

The CSV is written after every case, so that a run that is stopped leaves what it has measured.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moda_kernels.yardstick import report

from . import gate, results
from .cases import TABLES, Case, draw
from .floors import Ceilings, floor_ms, measure_ceilings
from .plots import draw_sweeps
from .registry import Benchmark, NotMeasured, number, require_gpu, results_option
from .timing import Quantiles, measure_launched
from .variants import VARIANTS, Bound, NotRun, Tensors, Variant, bind

COLUMNS = (
    "table", "sweep", "case", "T", "G", "Hq", "Hk", "D", "S", "B", "causal", "depth_chunk", "sequence", "docs", "every",
    "fp8", "dtype",
    "variant", "exact", "pass", "status", "median_ms", "p20_ms", "p80_ms", "repeats", "timing", "floor_ms", "over_floor",
    "cudnn_ms", "over_cudnn", "reason", "paper_fa2_triton_ms", "paper_moda_triton_ms", "copy_tb_s", "matmul_tflop_s",
    "rounding_errors",
)  # fmt: skip

Progress = Callable[[str], None]
Truth = tuple[Tensors, gate.Values, gate.Values]


def _compile(case: Case, name: str) -> None:
    """Launch the kernels of a variant on a short copy of a case; what is left is Triton's compilation cache."""
    try:
        bound = bind(VARIANTS[name], case, draw(case))
        saved = bound.forward()
        bound.backward(saved)
        if not case.sequence and bound.backward_add is not None:
            bound.backward_add(saved)
    except Exception as error:  # met again, and recorded, when it is measured
        print(f"{case.name} {name}: {error}")


def _compile_all(cases: Sequence[Case], variants: Sequence[str], jobs: int) -> None:
    """Compile in ``jobs`` processes what the cases launch; Triton's disk cache hands it to this process."""
    short = [dataclasses.replace(case, T=gate.GATE_LENGTH) for case in cases]
    ours = [v for v in variants if VARIANTS[v].backend in ("fused", "split")]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.starmap(_compile, itertools.product(short, ours), chunksize=1)


def run_table(
    table: str,
    out: Path,
    variants: Sequence[str] = tuple(VARIANTS),
    jobs: int = 0,
    only: str | None = None,
    budget_ms: float = 150.0,
    progress: Progress = print,
) -> Path:
    """Measure a table and write ``out/table_<table>.csv``.

    :param variants: names of :data:`moda_kernels.benchmarks.variants.VARIANTS`.
    :param jobs: processes that compile beforehand; 0 compiles as it goes.
    :param only: measure the cases whose name contains this.
    :param budget_ms: repetitions of each measurement take about this long (at least five).

    :raises NotMeasured: where no case's name contains ``only``.
    """
    cases = [c for c in TABLES[table] if only is None or only in c.name]
    if not cases:
        raise NotMeasured(
            f"--only: expected part of a case's name ({', '.join(c.name for c in TABLES[table])}), got {only}"
        )
    started = time.time()
    if jobs > 1:
        _compile_all(cases, variants, jobs)
    progress(f"table {table}: compiled in {time.time() - started:.0f} s")
    ceilings, where = measure_ceilings(), results.provenance()
    progress(
        f"{where['gpu']}: copy {ceilings.bandwidth / 1e12:.2f} TB/s, bf16 product {ceilings.matrix_rate / 1e12:.0f} TFLOP/s"
    )
    path = out / f"table_{table}.csv"
    rows: list[dict[str, object]] = []
    for case in cases:
        rows += _run_case(case, [VARIANTS[v] for v in variants], ceilings, budget_ms, progress)
        results.write(path, rows, where)
    progress(f"table {table}: {len(rows)} rows in {time.time() - started:.0f} s, {path}")
    return path


def _run_case(
    case: Case, variants: Sequence[Variant], ceilings: Ceilings, budget_ms: float, progress: Progress
) -> list[dict[str, object]]:
    x = draw(case)
    truths: dict[bool, Truth] = {}
    baseline = _baseline(case, x)
    rounding = gate.rounding_errors(case) if case.fp8 else None
    if rounding is not None:
        progress(f"{case.name:28s} rounding to fp8: {rounding}")
    rows = []
    for variant in variants:
        status, reason, exact = "ok", "", variant.exact
        times: dict[str, tuple[Quantiles, Quantiles | None]] = {}
        try:
            exact = bind(variant, case, x).exact
            if variant.depth not in truths:
                truths[variant.depth] = gate.short_truth(case, variant.depth)
            judged = gate.check(variant, case, x, truths[variant.depth])
            if all(v.passed for v in judged):
                times = _times(variant, case, x, baseline, budget_ms)
            else:
                status, reason = "parity failed", report([v for v in judged if not v.passed]).replace("\n", "; ")
        except NotRun as error:
            status, reason = "not run", str(error)
        except ValueError as error:
            status, reason = "refused", str(error)
        except Exception as error:  # recorded as a failure, and the other variants go on
            status, reason = "failed", f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        torch.cuda.empty_cache()
        for what in times or ("both",):
            row = _row(case, variant, exact, what, status, reason, ceilings) | {"rounding_errors": rounding}
            if times:
                q, cudnn = times[what]
                floor = floor_ms(case, what, ceilings) if variant.depth else None
                spread = {f"{n}_ms": round(getattr(q, n), 5) for n in ("median", "p20", "p80")}
                row.update(spread, repeats=q.repeats, timing=q.timing)
                if floor is not None:
                    row.update(floor_ms=round(floor, 5), over_floor=round(q.median / floor, 4))
                if cudnn is not None:
                    row.update(cudnn_ms=round(cudnn.median, 5), over_cudnn=round(q.median / cudnn.median, 4))
            rows.append(row)
        shown = " ".join(map(_shown, times.items())) or f"{status}: {reason[:300]}"
        progress(f"{case.name:28s} {variant.name:12s} {shown}")
    return rows


def _shown(timed: tuple[str, tuple[Quantiles, Quantiles | None]]) -> str:
    what, (own, cudnn) = timed
    return f"{what} {own.median:.3f}" + (f" ({own.median / cudnn.median:.3f})" if cudnn is not None else "")


def _baseline(case: Case, x: Tensors) -> Bound | None:
    """cuDNN attention without depth, or None where it cannot run the case (its own row says why)."""
    try:
        bound = bind(VARIANTS["cudnn"], case, x)
        bound.backward(bound.forward())
        torch.cuda.synchronize()
    except (NotRun, ValueError, RuntimeError):
        return None
    return bound


def _passes(bound: Bound) -> dict[str, Callable[[], object]]:
    saved = bound.forward()
    return {
        "forward": bound.forward,
        "backward": lambda: bound.backward(saved),
        "both": lambda: bound.backward(bound.forward()),
    }


def _times(
    variant: Variant, case: Case, x: Tensors, baseline: Bound | None, budget_ms: float
) -> dict[str, tuple[Quantiles, Quantiles | None]]:
    """Per pass the variant's times and those of cuDNN, taken in turns with it."""
    bound = bind(variant, case, x)
    passes = _passes(bound)
    if not case.sequence and bound.backward_add is not None:
        add, saved = bound.backward_add, bound.forward()
        passes["backward-add"] = lambda: add(saved)
    beside = {} if baseline is None or variant.name == "cudnn" else _passes(baseline)
    times: dict[str, tuple[Quantiles, Quantiles | None]] = {}
    for name, run in passes.items():
        if name in beside:
            cudnn, own = measure_launched([beside[name], run], budget_ms)
            times[name] = own, cudnn
        else:
            (own,) = measure_launched([run], budget_ms)
            times[name] = own, own if variant.name == "cudnn" else None
    return times


def _row(
    case: Case, variant: Variant, exact: str, what: str, status: str, reason: str, ceilings: Ceilings
) -> dict[str, object]:  # fmt: skip
    row: dict[str, object] = {name: getattr(case, name, None) for name in COLUMNS}
    paper = case.paper_ms if case.paper_ms is not None and what == "both" else (None, None)
    row.update(case=case.name, Hq=case.G * case.Hk, dtype="bfloat16", variant=variant.name, exact=exact)
    row.update(
        {"pass": what}, status=status, reason=reason, paper_fa2_triton_ms=paper[0], paper_moda_triton_ms=paper[1]
    )
    row["copy_tb_s"] = round(ceilings.bandwidth / 1e12, 3)
    row["matmul_tflop_s"] = round(ceilings.matrix_rate / 1e12, 1)
    return row


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)
    parser.add_argument("--table", required=True, choices=tuple(TABLES), help="what to measure")
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME",
        help=f"measure these variants only: {', '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--only", metavar="TEXT", help="measure the cases whose name contains TEXT")
    parser.add_argument("--jobs", type=number(int, 0), default=0, help="processes that compile beforehand (0: none)")
    parser.add_argument(
        "--budget-ms", type=number(float, 0, above=True), default=150.0, help="time of each measurement's repetitions"
    )
    parser.add_argument("--plot-only", action="store_true", help="draw the plots of an existing CSV")


def _run(args: argparse.Namespace) -> None:
    path = args.out / f"table_{args.table}.csv"
    if not args.plot_only:
        require_gpu()
        if path.is_file() and (args.only is not None or set(args.variants) != set(VARIANTS)):
            raise NotMeasured(
                f"--only and --variants: part of a table would replace all of {path}; choose another --out"
            )
        run_table(args.table, args.out, args.variants, args.jobs, args.only, args.budget_ms)
    elif not path.is_file():
        raise NotMeasured(f"file not found: {path}")
    try:
        plots = draw_sweeps(path)
    except ImportError:
        raise NotMeasured(f"no plots of {path}: they need matplotlib") from None
    for plot in plots:
        print(f"plot: {plot}")


BENCHMARK = Benchmark("kernels", "the operator: tables of the paper, and siblings", _add_options, _run)
