"""Sinkhorn and Knopp's scaling of small matrices: nearly doubly stochastic ones, of logits, differentiable.

The exponentials of the logits, of which in each iteration the columns, then the rows, are scaled to sum to 1 (arXiv 2512.24880,
Eq. 9).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["naive_sinkhorn", "sinkhorn"]


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Matrices ``[..., n, n]`` of logits. On a GPU one kernel forward and one backward, which keep the logits alone.

    :param logits: fp32, or fp64, which is computed in PyTorch. :param iterations: at least one.
    """
    if logits.is_cuda and logits.dtype == torch.float32:
        n = logits.shape[-1]
        return _op(logits.reshape(-1, n, n), iterations).view(logits.shape)
    return naive_sinkhorn(logits, iterations)


def naive_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """:func:`sinkhorn` in PyTorch, on any device."""
    matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


@torch.library.custom_op("moda::sinkhorn", mutates_args=())
def _op(logits: Tensor, iterations: int) -> Tensor:
    from .kernel import sinkhorn_forward

    return sinkhorn_forward(logits.contiguous(), iterations)


@_op.register_fake
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


_op.register_autograd(_backward, setup_context=_context)
