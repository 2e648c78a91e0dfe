"""Several linears of one input as one matrix product."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.func import functional_call

from moda.depth.mechanism import local

__all__ = ["joint_linear"]


def joint_linear(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What each of ``linears`` makes of ``x``, by one matrix product.

    Narrow products leave a GPU idle, and in the backward pass each would write a gradient of ``x`` of its own. Under tensor
    parallelism it is this rank's part of their outputs. In float8 (:mod:`moda.train.float8`) it is the first one's product with
    all their weights, under one scale where there is one for each tensor.
    """
    # Some have sizes that float8 does not take, or they are wrapped to be computed again in the backward pass.
    if len({type(linear) for linear in linears}) > 1 or not isinstance(linears[0], nn.Linear):
        return tuple(linear(x) for linear in linears)
    weights = [local(linear.weight) for linear in linears]
    bias = None if linears[0].bias is None else torch.cat([local(linear.bias) for linear in linears])
    if type(linears[0]) is nn.Linear:
        out = nn.functional.linear(x, torch.cat(weights), bias)
    else:
        joint = {"weight": torch.cat(weights), **({} if bias is None else {"bias": bias})}
        out = functional_call(linears[0], joint, (x,))
    return out.split([w.shape[0] for w in weights], dim=-1)
