"""Milliseconds by CUDA events: warm up, estimate, repeat, quantiles. The L2 cache is overwritten before every repetition.

What is compared is timed in turns, one repetition of each after the other: under load the clock of a GPU falls by several
per cent within seconds, and of two medians taken one after the other the second would carry that.

What is shorter than :data:`GRAPH_BELOW_MS` is timed as the replay of a CUDA graph: the host may need as long to launch it.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Quantiles(NamedTuple):
    """:param timing: ``events``, or ``graph`` for the replay of a CUDA graph."""

    median: float
    p20: float
    p80: float
    repeats: int
    timing: str = "events"


GRAPH_BELOW_MS = 1.5


def measure(runs: Sequence[Callable[[], object]], budget_ms: float = 150.0, most: int = 50) -> list[Quantiles]:
    """Median, 20th and 80th percentile of each of ``runs``, in turns; at least five repetitions, about ``budget_ms`` of each."""
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for run in runs:
        run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for run in runs:
        run()
    end.record()
    torch.cuda.synchronize()
    repeats = max(5, min(most, int(budget_ms * len(runs) / max(start.elapsed_time(end), 1e-3))))
    marks = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in runs]
        for _ in range(repeats)
    ]
    for turn in marks:
        for run, (before, after) in zip(runs, turn):
            cache.zero_()
            before.record()
            run()
            after.record()
    torch.cuda.synchronize()
    return [quantiles([a.elapsed_time(b) for a, b in of_one]) for of_one in zip(*marks)]


def quantiles(times: Sequence[float]) -> Quantiles:
    """Median, 20th and 80th percentile of times in any unit."""
    times = sorted(times)

    def quantile(f: float) -> float:
        at = f * (len(times) - 1)
        low = int(at)
        high = min(low + 1, len(times) - 1)
        return times[low] + (at - low) * (times[high] - times[low])

    return Quantiles(quantile(0.5), quantile(0.2), quantile(0.8), len(times))


def measure_launched(runs: Sequence[Callable[[], object]], budget_ms: float = 150.0, most: int = 50) -> list[Quantiles]:
    """:func:`measure`, and again as graphs where one is short; where one cannot be captured all keep their first times."""
    plain = measure(runs, budget_ms, most)
    if all(q.median >= GRAPH_BELOW_MS for q in plain):
        return plain
    graphs = []
    for run in runs:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return plain
        graphs.append(graph)
    return [q._replace(timing="graph") for q in measure([g.replay for g in graphs], budget_ms, most)]


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of one call, by itself."""
    return measure([run])[0].median


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, to the end of what it does on the GPU: for what takes milliseconds and more."""

    def wait() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began
