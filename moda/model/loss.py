"""The loss of a language model's head without the logits: they exist for some rows at a time, and become their own gradient.

Forward and backward are one pass: the gradients of hidden states and head are computed beside the loss and only scaled by the
gradient of the loss later. The head's gradient is added up over the chunks in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moda_kernels.cross_entropy import cross_entropy_

__all__ = ["LOSS_BYTES", "chunk_rows", "linear_cross_entropy"]

#: Bytes for a chunk's logits and the head's gradient in fp32, for heads of which 1024 rows of logits leave room for it.
LOSS_BYTES = 2**30


def chunk_rows(d_model: int, columns: int, element_size: int, gpu: bool = True) -> int:
    """Rows of logits to hold at a time: a power of two, as many as :data:`LOSS_BYTES` allow, from 256 to 8192 (on a CPU 512)."""
    room = LOSS_BYTES - 4 * d_model * columns
    rows = max(256, min(8192 if gpu else 512, room // (columns * element_size)))
    return 1 << (rows.bit_length() - 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, added up in the dtype of ``total``: fp32 where those of a and b have half its bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(a @ b)


@torch.library.custom_op("moda::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab: int,
    ignore_index: int,
    z_loss: float,
    d_hidden: bool,
    d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of all losses, cross-entropies ``[N]``, z-losses ``[N]``, and the gradients of the sum that are asked for."""
    n, columns = hidden.shape[0], weight.shape[0]
    rows = min(n, chunk_rows(hidden.shape[1], columns, hidden.element_size(), hidden.is_cuda))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(2, n, dtype=wide)
    h_grad = torch.empty_like(hidden) if d_hidden else hidden.new_empty(0)
    w_grad = torch.zeros_like(weight, dtype=wide) if d_weight else weight.new_empty(0)
    buffer = hidden.new_empty(rows, columns)
    for start in range(0, n, max(1, rows)):
        h, chunk = hidden[start : start + rows], slice(start, start + rows)
        logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
        losses[0, chunk], losses[1, chunk] = cross_entropy_(
            logits, labels[chunk], vocab=vocab, ignore_index=ignore_index, z_loss=z_loss, gradient=d_hidden or d_weight
        )
        if d_hidden:
            torch.mm(logits, weight, out=h_grad[chunk])
        if d_weight:
            _add_product(w_grad, logits.t(), h)
    del buffer
    total = losses.sum(dtype=torch.float64).to(wide)
    return total, losses[0].clone(), losses[1].clone(), h_grad, w_grad.to(weight.dtype)


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab: int,
    ignore_index: int,
    z_loss: float,
    d_hidden: bool,
    d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ce, z = (
        hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)) for _ in range(2)
    )
    h_grad = torch.empty_like(hidden) if d_hidden else hidden.new_empty(0)
    return ce.new_empty(()), ce, z, h_grad, torch.empty_like(weight) if d_weight else weight.new_empty(0)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.wanted = inputs[-2:]


def _scale_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # The factor has one dimension, or it would be rounded to the dtype of the gradients.
    scaled = [
        torch.mul(g, grad.view(1), out=torch.empty_like(g)) if w else None
        for g, w in zip(ctx.saved_tensors, ctx.wanted)
    ]
    return (*scaled, *[None] * 6)


_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int, ignore_index: int = -100, z_loss: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T`` and its z-loss (see :mod:`moda_kernels.cross_entropy`), without the logits.

    :param hidden: ``[N, d]``; cast with ``weight`` as autocast casts a linear's.
    :param weight: ``[rows, d]``; rows from ``vocab`` on are padding.
    :param labels: int64 ``[N]``; ``ignore_index`` where there is nothing to predict.

    :returns: the sum of all losses, which alone is differentiable, and the cross-entropies and the z-losses ``[N]``; fp32, or
        fp64 for fp64.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    grad = torch.is_grad_enabled()
    total, ce, z, *_ = _op(
        hidden, weight, labels, vocab, ignore_index, z_loss or 0.0,
        grad and hidden.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return total, ce, z
