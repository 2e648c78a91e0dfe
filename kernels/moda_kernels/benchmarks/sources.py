"""Sums over sources: each kernel's time over the floor of its bytes (:mod:`moda_kernels.sources.kernel`), at a large copy's rate.

``backward`` stores the gradients of sources, ``backward-add`` adds to them. What fails parity on 512 tokens is not timed.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..sources import NaiveSums, Target
from ..yardstick import verdicts
from . import results
from .floors import measure_ceilings
from .registry import Benchmark, require_gpu, results_option
from .timing import Quantiles, measure

#: Kind, sums at once, sources, width, tokens: DenseFormer's and MUDD's last layer of 24, attention residuals' of as many.
CASES = [
    (kind, c, n, d, tokens)
    for d, tokens in ((384, 65_536), (1024, 32_768))
    for kind, c, n in (("static", 1, 25), ("by token", 4, 24), ("attend", 2, 47), ("attend", 1, 49), ("by token", 4, 6))
]
EPS = 1e-6

Measure = Callable[[Sequence[Callable[[], object]]], list[Quantiles]]


def moved(kind: str, c: int, n: int, d: int, tokens: int, what: str) -> float:
    """Bytes that ``forward``, ``backward`` or ``backward-add`` cannot do without, in bf16."""
    numbers = {"forward": n + c, "backward": 2 * n + c, "backward-add": 3 * n + c}[what] * d
    if kind == "by token":  # weights, and their gradients
        numbers += (1 if what == "forward" else 2) * c * n
    elif kind == "attend":  # the sums, for the backward pass; LSEs
        numbers += 2 * c + (0 if what == "forward" else c * d)
    return 2.0 * tokens * numbers


def _runs(sums: Any, kind: str, data: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    x, weights, grads, grad_lse, grad = data
    new = {"backward": (0, len(x)), "backward-add": (0, 0)}
    if kind == "attend":
        out, lse = sums.attend(x, weights, EPS)
        saved = (x, weights, EPS, out, lse, grads, grad_lse)
        runs = {what: functools.partial(sums.attend_backward, *saved, Target(grad, at)) for what, at in new.items()}
        return {"forward": functools.partial(sums.attend, x, weights, EPS), **runs}
    runs = {what: functools.partial(sums.mix_backward, x, weights, grads, Target(grad, at)) for what, at in new.items()}
    return {"forward": functools.partial(sums.mix, x, weights), **runs}


def _draw(kind: str, c: int, n: int, d: int, tokens: int, device: str) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    weights = {"static": (c, n), "by token": (1, tokens, c, n), "attend": (c, d)}[kind]
    x, grads = draw(n, 1, tokens, d), [draw(1, tokens, d) for _ in range(c)]
    wide = torch.float32 if kind == "attend" else torch.bfloat16
    return x, draw(*weights).to(wide), grads, draw(c, 1, tokens).float(), torch.zeros_like(x)


def _passes(sums: Any, kind: str, data: tuple[Any, ...]) -> bool:
    def seen(sums: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        x, weights, grads, grad_lse, grad = data
        wide = torch.promote_types(dtype, weights.dtype)
        given = (
            x.to(dtype),
            weights.to(wide),
            [g.to(dtype) for g in grads],
            grad_lse.to(wide),
            grad.to(dtype, copy=True),
        )
        runs = _runs(sums, kind, given)
        out = runs["forward"]()
        return {
            "out": torch.stack(out[0] if kind == "attend" else out), "weights": runs["backward"](), "sources": given[-1],
        }  # fmt: skip

    plain, truth = (seen(NaiveSums(), dtype) for dtype in (data[0].dtype, torch.float64))
    return all(v.passed for v in verdicts(seen(sums, data[0].dtype), plain, truth))


def sources_table(
    cases: Sequence[tuple[str, int, int, int, int]], bandwidth: float, device: str = "cuda", measure: Measure = measure
) -> list[dict[str, Any]]:
    """A row for each case and pass. :param bandwidth: bytes per second."""
    from ..sources.kernel import FusedSums

    table = []
    for kind, c, n, d, tokens in cases:
        case = dict(kind=kind, sums=c, sources=n, d=d, tokens=tokens)
        passed = _passes(FusedSums(), kind, _draw(kind, c, n, d, min(tokens, 512), device))
        runs = _runs(FusedSums(), kind, _draw(kind, c, n, d, tokens, device))
        times = measure(list(runs.values())) if passed else [None] * len(runs)
        for what, q in zip(runs, times):
            floor = 1e3 * moved(kind, c, n, d, tokens, what) / bandwidth
            row: dict[str, Any] = {**case, "pass": what, "status": "ok" if passed else "parity failed"}
            row |= dict(floor_ms=round(floor, 4), median_ms="", p20_ms="", p80_ms="", over_floor="")
            if q is not None:
                row |= dict(median_ms=round(q.median, 4), p20_ms=round(q.p20, 4), p80_ms=round(q.p80, 4))
                row["over_floor"] = round(q.median / floor, 3)
            table.append(row)
    return table


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)


def _run(args: argparse.Namespace) -> None:
    require_gpu()
    table = sources_table(CASES, measure_ceilings().bandwidth)
    for row in table:
        print(*row.values())
    print(results.write(args.out / "table_sources.csv", table))


BENCHMARK = Benchmark("sources", "sums over the outputs of earlier layers, against their bytes", _add_options, _run)
