"""Depth-Attention (arXiv 2606.05014): before a layer attends over the sequence, its values are mixed along depth.

For key/value head h of token t in layer l, with keys k (normalised and rotated) and values v of the same token in this layer and
in some earlier ones i, and the mean q' of the queries of the heads that share h:

    u_l = sum over i of p_i u_i + p_l v_l        p = softmax over i and l of (q'_l . k_i, q'_l . k_l) / sqrt(D)

The attention reads u_l in place of v_l, the KV cache holds it, and later layers mix u_l, which is mixed already. There are no
parameters. Earlier layers are those whose number is a multiple of a stride, and the most recent ones if asked for. The formula
is that of the authors' code (its path for grouped heads), as are the defaults: a stride of half the layers, and no recent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moda.ranges import Count, Natural
from moda_kernels.depth.layout import ATTENTION, DepthLayout

from .mechanism import (
    AttentionHost,
    Context,
    DepthLayer,
    DepthMechanism,
    DepthModel,
    Received,
    State,
    refused_but,
)
from .moda import SlotsModel, layout_of
from .read import SlotPolicy

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["DepthAttention"]


class _Layer(DepthLayer):
    """Mixes its values with those in the slots that it reads, and writes a slot if a later layer reads it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def attend(
        self, attention: AttentionHost, x: Received, state: State, context: Context
    ) -> tuple[torch.Tensor, State]:
        q, k, v = attention.project(x)
        q, k = attention.normalise(q, attention.q_norm), attention.normalise(k, attention.k_norm)
        q, k = attention.rotate(q, k, context)
        own = k, v.unflatten(-1, (-1, attention.head_dim))
        by_head = q.unflatten(2, (k.shape[2], -1)).mean(3)
        mixed, state = attention.attend_slots(by_head, own, state, context)
        out = attention.attend(q, k, mixed, context)
        if self.writes:
            state = attention.write_slot(k, mixed, ATTENTION, state, context)
        return attention.output(out), state


@dataclass(frozen=True)
class _Selected(SlotPolicy):
    """The layers whose number is a multiple of ``stride``, and the ``recent`` last ones."""

    stride: int
    recent: int

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return tuple(i for i in range(layer) if i % self.stride == 0 or i >= layer - self.recent)

    def describe(self) -> str:
        recent = f" and the last {self.recent}" if self.recent else ""
        return f"values of the layers 0, {self.stride}, {2 * self.stride}, ...{recent}"


@dataclass(frozen=True)
class DepthAttention(DepthMechanism):
    """Mix each layer's values with those of earlier layers, by attention along depth.

    :param stride: mix the values of every how many of the earlier layers; null for half the layers.
    :param recent: how many of the most recent layers are mixed in any case.
    """

    name = "depth_attention"
    source = "arXiv 2606.05014"
    refused = refused_but("tensor_parallel", "pipeline_parallel")

    stride: Count | None = None
    recent: Natural = 0

    def _selected(self, n_layers: int) -> _Selected:
        return _Selected(max(1, n_layers // 2) if self.stride is None else self.stride, self.recent)

    def layout(self, n_layers: int) -> DepthLayout:
        return layout_of(self._selected(n_layers), n_layers, 1)

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return _Layer(self.layout(model.n_layers).written_slot(index, ATTENTION) is not None)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return SlotsModel(self.layout(model.n_layers))

    @staticmethod
    def _width(model: ModelConfig) -> int:
        """Numbers of one token's keys (and of its values) in one slot."""
        assert model.n_kv_heads is not None and model.head_dim is not None
        return model.n_kv_heads * model.head_dim

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 4 * self._width(model) * (self.layout(model.n_layers).slots_read + model.n_layers)

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        size = float(tokens * self._width(model) * element_size)
        return {
            "values before mixing and what is read": 5 * size * model.n_layers,
        }

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        layout = self.layout(model.n_layers)
        return [
            ("depth slots", f"{layout.n_slots} ({layout.slots_read / model.n_layers:.1f} read per layer)"),
            ("a layer mixes", self._selected(model.n_layers).describe()),
        ]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        self._selected(model.n_layers).draw(axes, model.n_layers, 1)
