"""How fast requests are scored: as :func:`.scoring.score` does it (batches by length, contexts shared), padded to the task's
longest request, and a plain forward pass."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .model import ScoredModel
from .scoring import Span, default_batch_tokens, score
from .shared_prefix import Tree, lay_out

__all__ = ["benchmark", "load_spans", "save_spans"]


def save_spans(spans: Sequence[Span], path: Path) -> None:
    """Keep requests, so that a machine without the task data can run them."""
    with gzip.open(path, "wt") as f:
        json.dump([[s.ids, s.start, s.targets] for s in spans], f)


def load_spans(path: Path) -> list[Span]:
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


def _padded_to_longest(model: ScoredModel, spans: Sequence[Span], batch_tokens: int) -> list[float]:
    """The way of OLMo-core's evaluator at its simplest: data order, every batch as wide as the longest request of the task."""
    width = max(len(s.ids) for s in spans)
    size = max(1, batch_tokens // width)
    sums: list[float] = []
    for at in range(0, len(spans), size):
        chosen = spans[at : at + size]
        where = [(row, s.start + i, t) for row, s in enumerate(chosen) for i, t in enumerate(s.targets)]
        index = torch.tensor(where)
        layout = lay_out([Tree(s.ids, ((),)) for s in chosen], width)
        flat = model.token_log_probs(layout, index[:, 0], index[:, 1], index[:, 2]).cpu()
        sums += [part.sum().item() for part in flat.split([len(s.targets) for s in chosen])]
    return sums


def benchmark(
    model: ScoredModel, spans: Sequence[Span], *, batch_tokens: int | None = None, repeats: int = 3
) -> dict[str, Any]:
    """Medians of both ways over the same requests, checked against each other, and of a plain forward pass.

    :returns: tokens a second, padding not counted: ``scored`` and ``padded`` in tokens of the requests, ``scored_run`` in
        tokens that ran through the model (a shared context once), ``forward`` for all logits of full batches as long as
        the task's longest request; and the ratios ``scored`` to ``padded`` and ``scored_run`` to ``forward``.

    :raises RuntimeError: where the two ways disagree.
    """
    batch_tokens = batch_tokens or default_batch_tokens(model.device)
    tokens = sum(len(s.ids) for s in spans)
    width = max(len(s.ids) for s in spans)
    score(model, spans[:: max(1, len(spans) // 256)], batch_tokens=batch_tokens)
    scores = score(model, spans, batch_tokens=batch_tokens)
    found = [float(a.sum()) for a in scores.log_probs]
    truth = _padded_to_longest(model, spans, batch_tokens)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.02
    differences = [abs(a - b) / (1 + abs(b)) for a, b in zip(found, truth)]
    worst = max(differences)
    if not all(d <= tolerance for d in differences):  # so that NaN does not pass
        raise RuntimeError(f"the two ways of batching disagree by {worst:.2e} (relative), allowed {tolerance}")
    ids = torch.randint(0, model.vocab_size, (max(1, batch_tokens // width), width), device=model.device)
    model.logits(ids)
    ways: dict[str, Callable[[], Any]] = {
        "scored": lambda: score(model, spans, batch_tokens=batch_tokens),
        "padded": lambda: _padded_to_longest(model, spans, batch_tokens),
        "forward": lambda: model.logits(ids),
    }
    seconds = {
        name: statistics.median(_seconds(model, run) for _ in range(max(3, repeats))) for name, run in ways.items()
    }
    run = scores.tokens - scores.padded
    return {
        "requests": len(spans),
        "tokens": tokens,
        "tokens_run": run,
        "padding": scores.padded / scores.tokens,
        "longest": width,
        "batch_tokens": batch_tokens,
        "worst_difference": worst,
        "seconds": seconds,
        "tokens_per_second": {
            "scored": tokens / seconds["scored"],
            "scored_run": run / seconds["scored"],
            "padded": tokens / seconds["padded"],
            "forward": ids.numel() / seconds["forward"],
        },
        "scored_over_padded": seconds["padded"] / seconds["scored"],
        "run_over_forward": run / seconds["scored"] / (ids.numel() / seconds["forward"]),
    }
