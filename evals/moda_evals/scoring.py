"""Scoring many short sequences at the speed of few long ones: the same for perplexity and for downstream tasks.

Sequences are sorted by length and cut into batches of a bounded number of tokens, so that hardly anything is padding. Equal
sequences run once: the choices of a question that differ in their last token only (yes/no, A/B/C/D) share one row. Longer
continuations of one context share the context's run (:mod:`.shared_prefix`) where the model can do that. Batches
depend on the sequences and the batch size alone, never on the number of ranks, which take them in turn.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_rank, get_world_size

from moda.errors import UserError
from moda.progress import Report

from .model import MAX_LOGITS, ScoredModel
from .shared_prefix import Tree, can_share, grow, lay_out


def default_batch_tokens(device: torch.device) -> int:
    """Tokens in a batch where none is given: enough that a GPU takes longer than its launches, few on a CPU."""
    return 32768 if device.type == "cuda" else 4096


@dataclass(frozen=True)
class Span:
    """Tokens to score in one sequence: ``targets[i]`` is what should follow ``ids[: start + i + 1]``."""

    ids: tuple[int, ...]
    start: int
    targets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (0 <= self.start and 0 < len(self.targets) <= len(self.ids) - self.start):
            raise ValueError(f"Span: {len(self.targets)} targets do not fit {len(self.ids)} ids from {self.start}")


def continuation(context: Sequence[int], tokens: Sequence[int]) -> Span:
    """The span of ``tokens`` after a context that is not empty."""
    if not context or not tokens:
        raise ValueError("continuation: context and tokens must not be empty")
    return Span((*context, *tokens[:-1]), len(context) - 1, tuple(tokens))


@dataclass(frozen=True)
class Scores:
    """Log-probabilities, one fp32 array per span, and what they cost.

    :param tokens: tokens that went through the model, ``padded`` of them padding; ``seconds`` on the slowest rank.
    """

    log_probs: list[np.ndarray]
    tokens: int
    padded: int
    seconds: float


def world() -> tuple[int, int]:
    """Rank and number of processes."""
    return get_rank(), get_world_size()


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, positions: Sequence[int] | None = None, max_positions: int = 1 << 62
) -> list[list[int]]:
    """Indices of sequences, longest first, in batches of at most ``batch_tokens`` tokens with padding (one sequence at least).

    :param positions: scored positions of each sequence; a batch has at most ``max_positions`` of them.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    in_batch = 0  # positions
    for i in order:
        scored = 0 if positions is None else positions[i]
        if batches:
            longest, size = lengths[batches[-1][0]], len(batches[-1])
            full = (size + 1) * longest > batch_tokens
            # A batch of some size ends where the rest would be padded by more than a third.
            full = full or (size * longest * 8 > batch_tokens and lengths[i] * 3 < longest * 2)
        if not batches or full or in_batch + scored > max_positions:
            batches.append([])
            in_batch = 0
        batches[-1].append(i)
        in_batch += scored
    return batches


class _Batch:
    """A batch on its way: launched when made, waited for when read, so that the next one can be prepared meanwhile.

    :param spans: the spans of every tree, leaf by leaf.
    """

    def __init__(self, model: ScoredModel, trees: list[Tree], spans: list[list[list[Span]]]) -> None:
        layout = lay_out(trees, 8 if model.device.type == "cuda" else 1)
        where: tuple[list[int], list[int], list[int]] = ([], [], [])
        rows, columns, targets = where
        for r, (tree, of_tree) in enumerate(zip(trees, spans)):
            for leaf, of_leaf in enumerate(of_tree):
                for s in of_leaf:
                    rows += [r] * len(s.targets)
                    columns += tree.columns(leaf, s.start, len(s.targets))
                    targets += s.targets
        self.tokens = layout.ids.numel()
        self._lengths = [len(s.targets) for of_tree in spans for of_leaf in of_tree for s in of_leaf]
        flat = model.token_log_probs(layout, *map(torch.tensor, where))
        self._log_probs = flat
        self._ready: torch.cuda.Event | None = None
        if flat.is_cuda:  # a copy asked for later would wait for the next batch, which is then on the same stream
            self._log_probs = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._log_probs.copy_(flat, non_blocking=True)
            self._ready = torch.cuda.current_stream(flat.device).record_event()

    def read(self) -> list[np.ndarray]:
        """Log-probabilities of each span, in the order in which they were given."""
        if self._ready is not None:
            self._ready.synchronize()
        return np.split(self._log_probs.numpy(), np.cumsum(self._lengths)[:-1])


def _plan(trees: Sequence[Tree], positions: Sequence[int], batch_tokens: int, max_positions: int) -> list[list[int]]:
    """Batches of trees; those with continuations apart from ordinary sequences, whose attention needs no mask."""
    batches: list[list[int]] = []
    for shared in (False, True):
        chosen = [i for i, t in enumerate(trees) if (len(t.leaves) > 1) == shared]
        lengths = [trees[i].length for i in chosen]
        planned = plan_batches(lengths, batch_tokens, [positions[i] for i in chosen], max_positions)
        batches += [[chosen[i] for i in batch] for batch in planned]
    return batches


def score(
    model: ScoredModel, spans: Sequence[Span], *, batch_tokens: int | None = None, progress: Report | None = None
) -> Scores:
    """Score spans, shared among all ranks; every rank gets all results.

    :param batch_tokens: tokens in a batch, padding included; :func:`default_batch_tokens` if None.
    :param progress: told the tokens done and the tokens in all.

    :raises UserError: for a model that gives NaN.
    """
    started = time.monotonic()
    answers: dict[tuple[int, ...], list[int]] = {}  # distinct sequences in a fixed order, and each one's spans
    for i, span in sorted(enumerate(spans), key=lambda item: (-len(item[1].ids), item[1].ids)):
        answers.setdefault(span.ids, []).append(i)
    stems = [min(spans[i].start for i in indices) + 1 for indices in answers.values()]
    trees = grow(list(answers), stems, can_share(model.module))
    owners = [[answers[ids] for ids in tree.sequences] for tree in trees]
    positions = [sum(len(spans[i].targets) for leaf in o for i in leaf) for o in owners]
    most = max(1, MAX_LOGITS // model.vocab_size)
    in_batch = batch_tokens or default_batch_tokens(model.device)
    if model.head is None:  # it gives the logits of all tokens
        in_batch = min(in_batch, most)
    batches = _plan(trees, positions, in_batch, 1 << 62 if model.ends_with_head else most)
    rank, ranks = world()
    total = sum(t.length for t in trees)
    results: dict[int, np.ndarray] = {}
    done, used = 0, 0
    before: tuple[list[int], _Batch] | None = None
    for indices in (*batches[rank::ranks], None):
        launched = None
        if indices is not None:
            of_trees = [[[spans[j] for j in leaf] for leaf in owners[i]] for i in indices]
            launched = indices, _Batch(model, [trees[i] for i in indices], of_trees)
        if before is not None:  # read only now that the next one is running
            results.update(zip((j for i in before[0] for leaf in owners[i] for j in leaf), before[1].read()))
            used += before[1].tokens
            done += sum(trees[i].length for i in before[0])
            if progress is not None:
                progress(min(total, done * ranks), total)
        before = launched
    if ranks > 1:
        gathered = [(results, used)] * ranks
        dist.all_gather_object(gathered, (results, used))
        results = {k: v for part, _ in gathered for k, v in part.items()}
        used = sum(n for _, n in gathered)
    if any(np.isnan(values).any() for values in results.values()):  # every comparison with it would be false
        raise UserError("checkpoint", "log-probabilities that are numbers", "nan", "its weights have diverged")
    if progress is not None:
        progress(total, total)
    return Scores([results[i] for i in range(len(spans))], used, used - total, time.monotonic() - started)
