"""Sinkhorn and Knopp's scaling of small matrices: nearly doubly stochastic ones, of logits, differentiable.

The exponentials of the logits, of which in each iteration the columns, then the rows, are scaled to sum to 1 (arXiv 2512.24880,
Eq. 9).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["naive_sinkhorn", "sinkhorn"]

#: An exported model carries this file without the Triton kernels, and does without their ops.
_OPS = import_module(".ops", __name__) if Path(__file__).with_name("ops.py").is_file() else None


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Matrices ``[..., n, n]`` of logits. On a GPU one kernel forward and one backward, which keep the logits alone.

    :param logits: fp32, or fp64, which is computed in PyTorch. :param iterations: at least one.
    """
    if _OPS is not None and logits.is_cuda and logits.dtype == torch.float32:
        n = logits.shape[-1]
        result: Tensor = _OPS.scale(logits.reshape(-1, n, n), iterations)
        return result.view(logits.shape)
    return naive_sinkhorn(logits, iterations)


def naive_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """:func:`sinkhorn` in PyTorch, on any device."""
    matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix
