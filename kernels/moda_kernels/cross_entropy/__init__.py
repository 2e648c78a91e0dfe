"""Cross-entropy of rows of logits, whose gradient takes the logits' own memory.

With x a row's first ``vocab`` logits, y its label, lse = log sum exp(x) and z the weight of the z-loss:

    loss = lse - x_y + z lse^2             d loss / dx = softmax(x) (1 + 2 z lse) - onehot(y)

Columns from ``vocab`` on only pad the matrix: they are in no softmax, and their gradient is zero. So are loss and gradient of
rows whose label is ``ignore_index``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy_", "naive_cross_entropy_"]


def cross_entropy_(
    logits: Tensor, labels: Tensor, *, vocab: int, ignore_index: int, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses of rows of logits; with ``gradient`` the logits become the gradient of the sum of both.

    :param logits: ``[N, C]``, C >= ``vocab``, each row contiguous.
    :param labels: int64 ``[N]``, below ``vocab`` or ``ignore_index``. On a GPU another label makes its row's loss NaN.

    :returns: cross-entropies and z-losses, each ``[N]`` in fp32 (fp64 for fp64).

    :raises RuntimeError: on a CPU, for a label outside the vocabulary.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        from .rows import cross_entropy_ as fused

        return fused(logits, labels, vocab, ignore_index, z_loss, gradient)
    return naive_cross_entropy_(logits, labels, vocab, ignore_index, z_loss, gradient)


def naive_cross_entropy_(
    logits: Tensor, labels: Tensor, vocab: int, ignore_index: int, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """:func:`cross_entropy_` in PyTorch, on any device."""
    x = logits[:, :vocab]
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    kept = labels != ignore_index
    index = labels.where(kept, 0)[:, None]
    ce = -x.gather(1, index)[:, 0]
    if gradient:
        high = x.amax(1, keepdim=True)
        total = x.sub_(high).exp_().sum(1, keepdim=True)
        lse = (high + total.log())[:, 0]
        x.mul_((kept * (1 + 2 * z_loss * lse))[:, None] / total)
        x.scatter_add_(1, index, -kept[:, None].to(x.dtype))
        if x.dtype != logits.dtype:
            logits[:, :vocab] = x
        logits[:, vocab:] = 0
    else:
        lse = x.logsumexp(1)
    return (lse + ce) * kept, z_loss * lse**2 * kept
