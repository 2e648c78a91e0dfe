"""How fast requests are scored: batches by length against batches padded to the task's longest, and a plain forward pass."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch

from .model import ScoredModel
from .scoring import Span, plan_batches, score

__all__ = ["benchmark", "load_spans", "save_spans"]


def save_spans(spans: Sequence[Span], path: Path) -> None:
    """Keep requests, so that a machine without the task data can run them."""
    with gzip.open(path, "wt") as f:
        json.dump([[s.ids, s.start, s.targets] for s in spans], f)


def load_spans(path: Path) -> List[Span]:
    """What :func:`save_spans` wrote."""
    with gzip.open(path, "rt") as f:
        return [Span(tuple(ids), start, tuple(targets)) for ids, start, targets in json.load(f)]


def _synchronise(model: ScoredModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _seconds(model: ScoredModel, run: Callable[[], Any]) -> float:
    _synchronise(model)
    started = time.perf_counter()
    run()
    _synchronise(model)
    return time.perf_counter() - started


def _padded_to_longest(model: ScoredModel, spans: Sequence[Span], batch_tokens: int) -> List[float]:
    """The way of OLMo-core's evaluator at its simplest: data order, every batch as wide as the longest request of the task."""
    width = max(len(s.ids) for s in spans)
    size = max(1, batch_tokens // width)
    sums: List[float] = []
    for at in range(0, len(spans), size):
        chosen = spans[at : at + size]
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        where = []
        for row, s in enumerate(chosen):
            ids[row, : len(s.ids)] = torch.tensor(s.ids)
            where += [(row, s.start + i, t) for i, t in enumerate(s.targets)]
        index = torch.tensor(where)
        flat = model.token_log_probs(ids, index[:, 0], index[:, 1], index[:, 2])
        sums += [part.sum().item() for part in flat.split([len(s.targets) for s in chosen])]
    return sums


def benchmark(
    model: ScoredModel, spans: Sequence[Span], *, batch_tokens: int = 16384, repeats: int = 3
) -> Dict[str, Any]:
    """Medians of both ways over the same requests, checked against each other, and of a plain forward pass.

    :returns: tokens (those of the requests, padding not counted) a second: ``bucketed``, ``padded``, ``forward`` (all
        logits of full batches as long as the task's longest request), and their ratios.

    :raises RuntimeError: where the two ways disagree.
    """
    tokens = sum(len(s.ids) for s in spans)
    width = max(len(s.ids) for s in spans)
    warm = [
        s for batch in plan_batches([len(s.ids) for s in spans], batch_tokens)[:2] for s in (spans[i] for i in batch)
    ]
    score(model, warm, batch_tokens=batch_tokens)
    found = [float(a.sum()) for a in score(model, spans, batch_tokens=batch_tokens).log_probs]
    truth = _padded_to_longest(model, spans, batch_tokens)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.02
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(found, truth))
    if worst > tolerance:
        raise RuntimeError(f"the two ways of batching disagree by {worst:.2e} (relative), allowed {tolerance}")
    bucketed = sorted(_seconds(model, lambda: score(model, spans, batch_tokens=batch_tokens)) for _ in range(repeats))
    padded = sorted(_seconds(model, lambda: _padded_to_longest(model, spans, batch_tokens)) for _ in range(repeats))
    ids = torch.randint(0, model.vocab_size, (max(1, batch_tokens // width), width), device=model.device)
    model.logits(ids)
    forward = sorted(_seconds(model, lambda: model.logits(ids)) for _ in range(max(3, repeats)))
    middle = repeats // 2
    speed = {
        "bucketed": tokens / bucketed[middle],
        "padded": tokens / padded[middle],
        "forward": ids.numel() / forward[len(forward) // 2],
    }
    return {
        "requests": len(spans),
        "tokens": tokens,
        "longest": width,
        "batch_tokens": batch_tokens,
        "worst_difference": worst,
        "tokens_per_second": speed,
        "bucketed_over_padded": speed["bucketed"] / speed["padded"],
        "bucketed_over_forward": speed["bucketed"] / speed["forward"],
    }
