"""Depth-only MoDA: plain attention over the sequence, and a second softmax over the depth slots of the same token.

Slots are those of MoDA (:mod:`.moda`, the same options). For query head h of token t in layer l, with key/value head k = h // G:

    out = softmax(q . K_seq[0..t] / sqrt(D)) . V_seq[0..t]
        + softmax(q_depth . K_depth[t, slots of l] / sqrt(D)) . V_depth[t, slots of l]

and w_o projects the sum. A layer that reads no slot, such as the first, has the first term alone. The second term is the paper's
depth attention (arXiv 2603.15619, Eq. 5; the operator is the authors' Flash Depth Attention). In the paper its result is the
layer's input, in place of a residual stream. Neither paper nor code says how to use it beside an attention over the sequence: the
plain sum is this project's choice, an ablation of the one softmax that MoDA has for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .mechanism import AttentionHost, Context, DepthLayer, State, refused_but
from .moda import MoDA, SlotsLayer

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["DepthOnly"]


class _Layer(SlotsLayer):
    def _read(
        self,
        attention: AttentionHost,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_depth: torch.Tensor | None,
        state: State,
        context: Context,
    ) -> tuple[torch.Tensor, State]:
        query = q if q_depth is None else q_depth
        deep, state = attention.attend_slots(query, None, state, context, self.top, self._bias(q))
        return attention.attend(q, k, v, context) + deep, state


@dataclass(frozen=True)
class DepthOnly(MoDA):
    """Attention over the sequence plus attention over depth, each under a softmax of its own. Options are those of MoDA."""

    name = "depth_only"
    refused = refused_but("tensor_parallel", "pipeline_parallel")

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return _Layer(self, model, index)

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        assert model.head_dim is not None
        size = float(tokens * model.n_heads * model.head_dim * element_size)
        return {**super().memory(model, tokens, element_size), "outputs of both attentions": 2 * size * model.n_layers}
