"""The tensor without elements that orders the writes and reads of one forward pass under autograd, and where that order ends."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Ordered(Protocol):
    """What a forward pass writes to and reads from."""

    def end_backward(self) -> None:
        """Called when the backward pass has gone through all of it."""
        ...


class _Begin(torch.autograd.Function):
    """The last node of the backward pass, which keeps the owner alive until the graph is gone."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, owner: Ordered) -> Tensor:
        ctx.owner = owner
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.owner.end_backward()
        return None, None


def begin(owner: Ordered, device: torch.device | None) -> Tensor:
    """The first of these tensors: shape ``[0]``, fp32, requiring a gradient while autograd is on."""
    order: Tensor = _Begin.apply(torch.empty(0, device=device, requires_grad=torch.is_grad_enabled()), owner)
    return order
