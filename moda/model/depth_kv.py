"""What gives a layer's depth keys and values, and in which form they are written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from olmo_core.config import Config, StrEnum

from moda_kernels import DepthLayout

__all__ = ["DepthAttention", "DepthKVConfig", "DepthKeyNorm", "DepthProjection", "DepthRoPE", "joint_linear"]


class DepthAttention(StrEnum):
    """What the attention of a layer contributes to the depth stream."""

    reuse = "reuse"
    """The layer's own K and V (MoDA paper, Table 3 row 3): no new parameters."""
    project = "project"
    """Separate K/V projections of the attention's input (Table 3 row 5)."""


class DepthKeyNorm(StrEnum):
    """Which QK-norm a depth key goes through."""

    writer = "writer"
    """The writing layer's ``k_norm``, shared by all slots that layer writes."""
    reader = "reader"
    """The reading layer's ``k_norm`` (the authors' language-model script)."""
    none = "none"
    """Projected keys raw, reused keys as the sequence has them."""


class DepthRoPE(StrEnum):
    """Whether a depth key is rotated."""

    same_position = "same_position"
    """At its own token's position, so that its position relative to the query is zero."""
    none = "none"
    """Left unrotated against a rotated query (the authors' language-model script)."""


@dataclass
class DepthKVConfig(Config):
    """The depth stream of a model.

    :param attention: what a layer's attention writes.
    :param ffn: whether the input of a layer's FFN is projected to one more K/V pair (Table 3 row 4).
    :param key_norm: which norm depth keys go through.
    :param rope: whether depth keys are rotated.
    :param slots: how many of the most recent slots a layer reads; None for all of them.
    """

    attention: DepthAttention = DepthAttention.reuse
    ffn: bool = True
    key_norm: DepthKeyNorm = DepthKeyNorm.writer
    rope: DepthRoPE = DepthRoPE.same_position
    slots: int | None = None

    def layout(self, n_layers: int) -> DepthLayout:
        """Which slots the layers of a model of ``n_layers`` write and read."""
        return DepthLayout(n_layers=n_layers, ffn=self.ffn, window=self.slots)


def joint_linear(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What each of ``linears`` makes of ``x``, by one matrix product: narrow ones leave a GPU idle, and in the backward pass each
    would write a gradient of ``x`` of its own."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return nn.functional.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


class DepthProjection(nn.Module):
    """One depth K/V pair from a tensor of the block: two matrices ``d_model x (Hk * D)``.

    :param d_model: width of the input.
    :param width: Hk * D.
    :param bias: whether the two linears have biases.
    """

    def __init__(
        self, d_model: int, width: int, *, bias: bool, dtype: torch.dtype = torch.float32, init_device: str = "cpu"
    ) -> None:
        super().__init__()
        self.w_k = nn.Linear(d_model, width, bias=bias, dtype=dtype, device=init_device)
        self.w_v = nn.Linear(d_model, width, bias=bias, dtype=dtype, device=init_device)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[B, T, Hk * D]`` of ``x`` ``[B, T, d_model]``."""
        k, v = joint_linear(x, self.w_k, self.w_v)
        return k, v

    @staticmethod
    def num_params(d_model: int, width: int, bias: bool) -> int:
        """Parameters of one projection pair."""
        return 2 * (d_model * width + (width if bias else 0))
