"""Sums over depth: mechanisms whose layers read the outputs of all earlier ones (DenseFormer, MUDD, attention residuals).

:mod:`.stream` owns the outputs and their gradients and is differentiated as a whole, :mod:`.naive` computes the sums in PyTorch,
:mod:`.kernel` on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import NaiveSums
from .stream import Sources, Sums, Target

__all__ = ["NaiveSums", "Sources", "Sums", "Target", "fastest"]


def fastest(x: Tensor) -> Sums:
    """What computes sums for sources like ``x [B, T, d]`` in the shortest time: Triton's kernels on a GPU, but for fp64."""
    if x.is_cuda and x.dtype != torch.float64:
        from .kernel import FusedSums

        return FusedSums()
    return NaiveSums()
