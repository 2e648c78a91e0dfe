"""Several linears of one input as one matrix product."""

from __future__ import annotations

import torch
import torch.nn as nn

__all__ = ["joint_linear"]


def joint_linear(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What each of ``linears`` makes of ``x``, by one matrix product.

    Narrow products leave a GPU idle, and in the backward pass each would write a gradient of ``x`` of its own.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return nn.functional.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)
