"""One runner for every table: compile in parallel, gate, time, write the CSV after every case."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from moda_kernels.yardstick import report

from . import gate
from .cases import TABLES, Case, draw
from .floors import Ceilings, floor_ms, measure_ceilings
from .provenance import commit
from .timing import Quantiles, measure_launched
from .variants import VARIANTS, Bound, NotRun, Tensors, Variant, bind

__all__ = ["COLUMNS", "environment", "run_table"]

log = logging.getLogger(__name__)

COLUMNS = (
    "table", "sweep", "case", "T", "G", "Hq", "Hk", "D", "S", "B", "causal", "depth_chunk", "sequence", "docs", "dtype",
    "variant", "exact", "pass", "status", "median_ms", "p20_ms", "p80_ms", "repeats", "timing", "floor_ms", "over_floor",
    "cudnn_ms", "over_cudnn", "reason",
    "paper_fa2_triton_ms", "paper_moda_triton_ms", "copy_tb_s", "matmul_tflop_s", "gpu", "capability",
    "torch", "triton", "cuda", "cudnn", "commit", "date",
)  # fmt: skip

Progress = Callable[[str], None]
Truth = tuple[Tensors, gate.Values, gate.Values]


def environment() -> dict[str, str]:
    """GPU, versions, commit and date: the columns that say where a time is from."""
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def warm(table: str, jobs: int, variants: Sequence[str], only: str | None) -> None:
    """Compile in ``jobs`` processes what the table's cases launch; Triton's disk cache hands it to this process."""
    if jobs < 2:
        return
    work = [
        (i, v)
        for i, case in enumerate(_cases(table, only))
        for v in variants
        if VARIANTS[v].backend in ("fused", "split")
    ]
    command = [sys.executable, "-m", "moda_kernels.benchmarks.warm", table, only or ""]
    processes = [subprocess.Popen([*command, json.dumps(work[n::jobs])]) for n in range(min(jobs, len(work)))]
    for process in processes:
        process.wait()


def _cases(table: str, only: str | None) -> list[Case]:
    return [c for c in TABLES[table] if only is None or only in c.name]


def run_table(
    table: str,
    out: Path,
    variants: Sequence[str] = tuple(VARIANTS),
    jobs: int = 0,
    only: str | None = None,
    budget_ms: float = 150.0,
    progress: Progress = log.info,
) -> Path:
    """Measure a table and write ``out/table_<table>.csv``.

    :param variants: names of :data:`moda_kernels.benchmarks.variants.VARIANTS`.
    :param jobs: processes that compile beforehand; 0 compiles as it goes.
    :param only: measure the cases whose name contains this.
    :param budget_ms: repetitions of each measurement take about this long (at least five).
    :raises ValueError: for a table or variant that does not exist.
    """
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or table not in TABLES:
        raise ValueError(
            f"bench: table must be one of {', '.join(TABLES)} and variants of {', '.join(VARIANTS)}, got {table!r}, "
            f"{', '.join(variants)}"
        )
    started = time.time()
    warm(table, jobs, variants, only)
    progress(f"table {table}: compiled in {time.time() - started:.0f} s")
    ceilings, where = measure_ceilings(), environment()
    progress(
        f"{where['gpu']}: copy {ceilings.bandwidth / 1e12:.2f} TB/s, bf16 product {ceilings.matrix_rate / 1e12:.0f} TFLOP/s"
    )
    path = out / f"table_{table}.csv"
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for case in _cases(table, only):
        rows += _run_case(case, [VARIANTS[v] for v in variants], ceilings, where, budget_ms, progress)
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    progress(f"table {table}: {len(rows)} rows in {time.time() - started:.0f} s, {path}")
    return path


def _run_case(
    case: Case,
    variants: Sequence[Variant],
    ceilings: Ceilings,
    where: dict[str, str],
    budget_ms: float,
    progress: Progress,
) -> list[dict[str, object]]:
    x = draw(case)
    truths: dict[bool, Truth] = {}
    baseline = _baseline(case, x)
    rows = []
    for variant in variants:
        status, reason = "ok", ""
        times: dict[str, tuple[Quantiles, Quantiles | None]] = {}
        try:
            bind(variant, case, x)
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
            row = _row(case, variant, what, status, reason, ceilings, where)
            if times:
                q, cudnn = times[what]
                floor = floor_ms(case, what, ceilings) if variant.depth else None
                row.update(
                    median_ms=round(q.median, 5),
                    p20_ms=round(q.p20, 5),
                    p80_ms=round(q.p80, 5),
                    repeats=q.repeats,
                    timing=q.timing,
                )
                if floor is not None:
                    row.update(floor_ms=round(floor, 5), over_floor=round(q.median / floor, 4))
                if cudnn is not None:
                    row.update(cudnn_ms=round(cudnn.median, 5), over_cudnn=round(q.median / cudnn.median, 4))
            rows.append(row)
        shown = " ".join(map(_shown, times.items())) or f"{status}: {reason[:300]}"
        progress(f"{case.name:28s} {variant.name:10s} {shown}")
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
    case: Case, variant: Variant, what: str, status: str, reason: str, ceilings: Ceilings, where: dict[str, str]
) -> dict[str, object]:
    paper = case.paper_ms if case.paper_ms is not None and what == "both" else (None, None)
    return {
        "table": case.table, "sweep": case.sweep, "case": case.name, "T": case.T, "G": case.G, "Hq": case.G * case.Hk,
        "Hk": case.Hk, "D": case.D, "S": case.S, "B": case.B, "causal": case.causal, "depth_chunk": case.depth_chunk,
        "sequence": case.sequence, "docs": case.docs, "dtype": "bfloat16", "variant": variant.name,
        "exact": variant.exact, "pass": what, "status": status, "reason": reason,
        "paper_fa2_triton_ms": paper[0], "paper_moda_triton_ms": paper[1],
        "copy_tb_s": round(ceilings.bandwidth / 1e12, 3), "matmul_tflop_s": round(ceilings.matrix_rate / 1e12, 1), **where,
    }  # fmt: skip
