"""Several linears of one input as one matrix product."""

from __future__ import annotations

import torch
import torch.nn as nn

from moda.depth.mechanism import local

__all__ = ["joint_linear"]


def joint_linear(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What each of ``linears`` makes of ``x``, by one matrix product.

    Narrow products leave a GPU idle, and in the backward pass each would write a gradient of ``x`` of its own. Under tensor
    parallelism it is this rank's part of their outputs.
    """
    weights = [local(linear.weight) for linear in linears]
    bias = None if linears[0].bias is None else torch.cat([local(linear.bias) for linear in linears])
    return nn.functional.linear(x, torch.cat(weights), bias).split([w.shape[0] for w in weights], dim=-1)
