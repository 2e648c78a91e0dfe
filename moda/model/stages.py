"""Pipeline parallelism: a model cut into stages, and what crosses a cut.

A stage is the model without the layers of other stages, under the same names. It is given the hidden states and those slots of
earlier layers that it or a later stage reads; a slot that several of its layers read arrives once. It gives the same to the next
stage, and in the backward pass the gradients of these tensors go the other way: a slot's is the sum over all its readers from the
stage on (:mod:`moda_kernels.depth.stages`).

With R ranks, stage i is on rank i % R. A rank that has several stages keeps the slots that a later one of them needs: those are
not sent to it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
from olmo_core.nn.transformer import Transformer

from moda.config.model import ModelConfig

__all__ = ["Stage", "cut", "make_stages", "run_stage"]


Slots = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """The layers ``first <= l < end`` of a model, stage ``index`` of ``count`` on ``ranks`` ranks.

    Slots go by their candidates' numbers (:class:`moda_kernels.DepthLayout`), increasing.

    :param width: d_model. :param slot: heads and head dim of a slot's keys and values.
    :param entering: slots that come from before. :param received: those of them that the rank does not have yet.
    :param leaving: slots that later stages need. :param sent: those of them that the next stage's rank does not have yet.
    :param kept: those of them that the rank keeps for the next of its own stages.
    """

    index: int
    count: int
    ranks: int
    first: int
    end: int
    width: int
    slot: tuple[int, int]
    entering: Slots
    received: Slots
    leaving: Slots
    sent: Slots
    kept: Slots

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def here(self) -> Slots:
        """Slots that enter and that the rank has kept."""
        return tuple(slot for slot in self.entering if slot not in self.received)

    def shapes(self, slots: int, batch: int, length: int, packed: bool = False) -> list[tuple[int, ...]]:
        """The shapes of what crosses a cut: ``[B, T, d_model]`` and, with S slots, ``[2 S, B, T, Hk, D]``."""
        rows = (1, batch * length) if packed else (batch, length)  # slots of packed documents are one row
        return [(batch, length, self.width), *([(2 * slots, *rows, *self.slot)] if slots else [])]

    def numbers(self, slots: Slots) -> int:
        """Numbers per token that cross a cut with these slots; in the backward pass as many go back."""
        return self.width + 2 * len(slots) * self.slot[0] * self.slot[1]

    @property
    def numbers_sent(self) -> int:
        """Those that go to the next stage."""
        return 0 if self.is_last else self.numbers(self.sent)


def _ends(model: ModelConfig, count: int, vocab_rows: int) -> list[int]:
    """Where each stage's layers end. The last stage has fewer, as it has the head."""
    assert model.head_dim is not None and model.n_kv_heads is not None and 1 <= count <= model.n_layers
    heads = 2 * (model.n_heads + model.n_kv_heads) * model.head_dim
    head = vocab_rows / (heads + 3 * model.ffn_hidden_size)  # in layers, by parameters
    last = max(1, min(round((model.n_layers + head) / count - head), model.n_layers - count + 1))
    before = model.n_layers - last
    return [before * (i + 1) // (count - 1) for i in range(count - 1)] + [model.n_layers]


def make_stages(model: ModelConfig, ranks: int, vocab_rows: int, per_rank: int = 1) -> list[Stage]:
    """Share a model's layers among ``ranks * per_rank`` stages, each at least one.

    :param vocab_rows: of the head, whose matrix product counts as those of as many layers as have its parameters.
    """
    count = ranks * per_rank
    ends = _ends(model, count, vocab_rows)
    layout = None if model.depth is None else model.depth.layout(model.n_layers)
    crossing = [() if layout is None else layout.crossing(layer) for layer in (0, *ends)]
    kinds = 1 if layout is None else layout.kinds
    # Of what enters stage i, what its rank has from its stage before, i - ranks.
    there = [tuple(c for c in crossing[i] if i >= ranks and c < ends[i - ranks] * kinds) for i in range(count)]
    received = [tuple(c for c in crossing[i] if c not in there[i]) for i in range(count)]
    shape = model.d_model, (model.n_kv_heads or 0, model.head_dim or 0)
    return [
        Stage(
            i, count, ranks, first, end, *shape, entering=crossing[i], received=received[i], leaving=crossing[i + 1],
            sent=received[i + 1] if i + 1 < count else (), kept=there[i + ranks] if i + ranks < count else (),
        )
        for i, (first, end) in enumerate(zip([0, *ends], ends))
    ]  # fmt: skip


def cut(model: Transformer, stage: Stage) -> None:
    """Leave of a whole model what a stage has, in place.

    The last stage of a model with tied embeddings keeps the embedding, which is its head's matrix; the first has it too.
    """
    _ = model.num_params, model.num_non_embedding_params  # OLMo-core keeps what they were of the whole model
    for layer in range(model.n_layers):
        if not stage.first <= layer < stage.end:
            del model.blocks[str(layer)]
    if not stage.is_last:
        model.lm_head = None  # type: ignore[assignment]
    if not stage.is_first and not (stage.is_last and model.tie_word_embeddings):
        model.embeddings = None  # type: ignore[assignment]
    model.tie_word_embeddings = model.tie_word_embeddings and model.lm_head is not None
    cast(Any, model).stage = stage


def run_stage(model: nn.Module, input_ids: torch.Tensor, received: tuple[torch.Tensor, ...], **options: Any) -> Any:
    """A forward pass through a model that was cut.

    :param input_ids: ``[B, T]``; of later stages only its shape matters. :param received: what the stage before gave.
    :param options: of the model's forward pass; labels are for the last stage.

    :returns: what goes to the next stage, or the model's result.
    """
    if received:
        options["input_embeddings"] = received[0]
        if len(received) > 1:
            options["slots"] = received[1]
    out = model(input_ids, **options)
    return (out,) if isinstance(out, torch.Tensor) and not cast(Any, model).stage.is_last else out
