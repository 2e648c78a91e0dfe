"""Perplexity of documents longer than the model's context: a sliding window with a stated stride.

A document t_0 .. t_{n-1} (its end token included) is read through windows of W tokens that begin at 0, s, 2s, ... Each token
after the first is predicted once, in the first window that has it; with s < W it then has at least W - s tokens before it.
With s = W a token that begins a window has none and is left out, as is the first token of a document.
``head``: only the first W tokens of each document count, which is what OLMo-core's in-loop validation measures.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moda.errors import UserError
from moda.progress import Report

from .model import ModelInfo, ScoredModel
from .scoring import Span, score
from .sets import OpenSet, TokenDocument

_CHUNK = 1 << 20  # tokens whose windows are planned together


@dataclass(frozen=True)
class Windows:
    """How documents are cut.

    :param size: W, tokens in a window.
    :param stride: s.
    :param head: whether only a document's first window counts.
    """

    size: int
    stride: int
    head: bool = False

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UserError("--window", "at least 2 tokens", self.size)
        if not 1 <= self.stride <= self.size:
            raise UserError("--stride", f"1 to the window's {self.size} tokens", self.stride)

    def check(self, model: ModelInfo) -> None:
        """:raises UserError: for a window longer than the model's context."""
        if self.size > model.context_length:
            expected = f"at most the model's context of {model.context_length} tokens"
            raise UserError("--window", expected, self.size, "or --context-length N")


def windows(n: int, cut: Windows) -> Iterator[tuple[int, int, int]]:
    """Windows ``(begin, end, first)`` of a document of ``n`` tokens: tokens first .. end - 1 are predicted in it."""
    predicted = 1
    for begin in range(0, 1 if cut.head else n, cut.stride):
        end = min(n, begin + cut.size)
        first = max(predicted, begin + 1)
        if first < end:
            yield begin, end, first
        predicted = end


def _spans(ids: np.ndarray, cut: Windows) -> list[Span]:
    tokens = tuple(ids.tolist())
    return [Span(tokens[b : e - 1], f - 1 - b, tokens[f:e]) for b, e, f in windows(len(tokens), cut)]


def loss_error(losses: np.ndarray, tokens: np.ndarray) -> float | None:
    """Standard error of a token-weighted mean loss when documents are drawn independently (linearised ratio)."""
    n = len(tokens)
    if n < 2:
        return None
    residuals = losses - losses.sum() / tokens.sum() * tokens
    return float(math.sqrt(n / (n - 1) * float((residuals**2).sum())) / tokens.sum())


def _groups(documents: Iterator[TokenDocument], limit: int | None, cut: Windows) -> Iterator[list[TokenDocument]]:
    """Documents with something to predict, in groups of about ``_CHUNK`` tokens."""
    group: list[TokenDocument] = []
    size = 0
    for document in itertools.islice((d for d in documents if len(d.ids) >= 2), limit):
        group.append(document)
        size += min(len(document.ids), cut.size) if cut.head else len(document.ids)
        if size >= _CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def evaluate_set(
    model: ScoredModel,
    documents: OpenSet,
    cut: Windows,
    *,
    limit: int | None = None,
    batch_tokens: int | None = None,
    per_example: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Loss of a model on a set.

    :param limit: only the first so many documents.
    :param per_example: add every document's loss as ``examples``.

    :returns: ``loss`` (nats per token, all tokens weighing the same), ``perplexity`` (its exponential), ``bits_per_byte``
        (None where the text's bytes are not known), standard errors over documents, counts.

    :raises UserError: for a window longer than the model's context, or a set with nothing to predict.
    """
    cut.check(model)
    rows: list[dict[str, Any]] = []
    n_bytes: int | None = 0
    used, padded, seconds, done = 0, 0, 0.0, 0
    for group in _groups(documents.documents(), limit, cut):
        spans = [_spans(d.ids, cut) for d in group]
        flat = list(itertools.chain(*spans))

        def report(now: int, total: int, before: int = done) -> None:
            if progress is not None:
                progress(before + now, before + total)

        scores = score(model, flat, batch_tokens=batch_tokens, progress=report)
        done += sum(len(s.ids) for s in flat)
        used, padded, seconds = used + scores.tokens, padded + scores.padded, seconds + scores.seconds
        log_probs = iter(scores.log_probs)
        for document, of_document in zip(group, spans):
            arrays = list(itertools.islice(log_probs, len(of_document)))
            nats, n_tokens = -float(sum(a.sum(dtype=np.float64) for a in arrays)), sum(map(len, arrays))
            rows.append({"id": len(rows), "loss": nats, "tokens": n_tokens, "length": len(document.ids)})
            whole = not cut.head or len(document.ids) <= cut.size
            if n_bytes is not None:
                n_bytes = None if document.n_bytes is None or not whole else n_bytes + document.n_bytes
    if not rows:
        raise UserError(documents.name, f"documents of two tokens or more in {documents.source}", "none")
    losses, tokens = [row["loss"] for row in rows], [row["tokens"] for row in rows]
    total, count = float(np.sum(losses)), sum(tokens)
    loss = total / count
    perplexity = math.exp(loss) if loss < 709.0 else math.inf  # math.exp overflows above
    error = loss_error(np.asarray(losses), np.asarray(tokens))
    result: dict[str, Any] = {
        "title": documents.title,
        "source": documents.source,
        "loss": loss,
        "loss_standard_error": error,
        "perplexity": perplexity,
        "standard_error": None if error is None else error * perplexity,
        "bits_per_byte": total / math.log(2) / n_bytes if n_bytes else None,
        "n": len(rows),
        "tokens_scored": count,
        "tokens_in_documents": sum(row["length"] for row in rows),
        "window": asdict(cut),
        "documents": {"loss": [round(x, 4) for x in losses], "tokens": tokens},
        "tokens": used,
        "padding": padded / max(1, used),
        "seconds": seconds,
    }
    return {**result, "examples": rows} if per_example else result
