"""Sinkhorn's scaling of matrices ``[N, n, n]`` as an op with its gradient, for compiled blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["scale"]


@torch.library.custom_op("moda::sinkhorn", mutates_args=())
def scale(logits: Tensor, iterations: int) -> Tensor:
    from .kernel import sinkhorn_forward

    return sinkhorn_forward(logits.contiguous(), iterations)


@scale.register_fake
def _(logits, iterations):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("moda::sinkhorn_backward", mutates_args=())
def _backward_op(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    from .kernel import sinkhorn_backward

    return sinkhorn_backward(logits.contiguous(), grad.contiguous(), iterations)


@_backward_op.register_fake
def _(logits, grad, iterations):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.iterations = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _backward_op(*ctx.saved_tensors, grad, ctx.iterations), None


scale.register_autograd(_backward, setup_context=_context)
