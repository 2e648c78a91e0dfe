"""Pipeline parallelism: a model cut into stages, and what crosses a cut.

A stage is the model without the layers of other stages, under the same names. It is given the hidden states and those slots of
earlier layers that it or a later stage reads; a slot that several of its layers read arrives once. It gives the same to the next
stage, and in the backward pass the gradients of these tensors go the other way: a slot's is the sum over all its readers from the
stage on (:mod:`moda_kernels.depth.stages`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
from olmo_core.nn.transformer import Transformer

from moda.config.model import ModelConfig

__all__ = ["Stage", "cut", "make_stages", "run_stage"]


@dataclass(frozen=True)
class Stage:
    """The layers ``first <= l < end`` of a model, stage ``index`` of ``count``.

    :param width: d_model. :param slot: heads and head dim of a slot's keys and values.
    :param received: slots that come from earlier stages. :param sent: slots that go to later ones.
    """

    index: int
    count: int
    first: int
    end: int
    width: int
    slot: tuple[int, int]
    received: int
    sent: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def shapes(self, slots: int, batch: int, length: int, packed: bool = False) -> list[tuple[int, ...]]:
        """The shapes of what crosses a cut: ``[B, T, d_model]`` and, with S slots, ``[2 S, B, T, Hk, D]``."""
        rows = (1, batch * length) if packed else (batch, length)  # slots of packed documents are one row
        return [(batch, length, self.width), *([(2 * slots, *rows, *self.slot)] if slots else [])]

    def numbers(self, slots: int) -> int:
        """Numbers per token that cross a cut with so many slots; in the backward pass as many go back."""
        return self.width + 2 * slots * self.slot[0] * self.slot[1]

    @property
    def numbers_sent(self) -> int:
        """Those that go to the next stage."""
        return 0 if self.is_last else self.numbers(self.sent)


def make_stages(model: ModelConfig, count: int, vocab_rows: int) -> list[Stage]:
    """Share a model's layers among ``count`` stages, each at least one: the last has fewer, as it has the head.

    :param vocab_rows: of the head, whose matrix product counts as those of as many layers as have its parameters.
    """
    assert model.head_dim is not None and model.n_kv_heads is not None and 1 <= count <= model.n_layers
    heads = 2 * (model.n_heads + model.n_kv_heads) * model.head_dim
    head = vocab_rows / (heads + 3 * model.ffn_hidden_size)
    last = round((model.n_layers + head) / count - head)
    last = max(1, min(last, model.n_layers - count + 1)) if count > 1 else model.n_layers
    before = model.n_layers - last
    ends = [before * (i + 1) // max(1, count - 1) for i in range(count - 1)] + [model.n_layers]
    layout = None if model.depth is None else model.depth.layout(model.n_layers)
    crossing = [0 if layout is None else len(layout.crossing(layer)) for layer in (0, *ends)]
    slot = (model.n_kv_heads, model.head_dim)
    return [
        Stage(i, count, first, end, model.d_model, slot, crossing[i], crossing[i + 1])
        for i, (first, end) in enumerate(zip([0, *ends], ends))
    ]


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
