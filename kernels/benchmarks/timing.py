"""Milliseconds by CUDA events: warm up, estimate, repeat, quantiles. The L2 cache is overwritten before every repetition.

What is shorter than :data:`GRAPH_BELOW_MS` is timed as the replay of a CUDA graph: the host may need as long to launch it.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple

import torch

__all__ = ["GRAPH_BELOW_MS", "Quantiles", "measure", "measure_launched", "median_ms"]


class Quantiles(NamedTuple):
    median: float
    p20: float
    p80: float
    repeats: int
    timing: str = "events"


GRAPH_BELOW_MS = 1.5


def measure(run: Callable[[], object], budget_ms: float = 150.0, most: int = 50) -> Quantiles:
    """Median, 20th and 80th percentile of ``run``; at least three repetitions, about ``budget_ms`` of them."""
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    repeats = max(3, min(most, int(budget_ms / max(start.elapsed_time(end), 1e-3))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        cache.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    times: List[float] = sorted(a.elapsed_time(b) for a, b in marks)

    def quantile(f: float) -> float:
        at = f * (len(times) - 1)
        low = int(at)
        high = min(low + 1, len(times) - 1)
        return times[low] + (at - low) * (times[high] - times[low])

    return Quantiles(quantile(0.5), quantile(0.2), quantile(0.8), repeats)


def measure_launched(run: Callable[[], object], budget_ms: float = 150.0, most: int = 50) -> Quantiles:
    """:func:`measure`, and again as a graph where that is short; what cannot be captured keeps its first times."""
    plain = measure(run, budget_ms, most)
    if plain.median >= GRAPH_BELOW_MS:
        return plain
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return plain
    return measure(graph.replay, budget_ms, most)._replace(timing="graph")


def median_ms(run: Callable[[], object]) -> float:
    return measure(run).median
