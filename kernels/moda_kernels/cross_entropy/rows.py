"""Cross-entropy and its gradient in place, one program a row: the row is read for its log-sum-exp, and again for the gradient.

The second reading goes backwards, over what the caches have of the first.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_EACH = tl.constexpr(8)  # neighbouring columns of one thread: 16 bytes of bf16


@triton.jit
def _load(logits, column, vocab, columns):
    """Logits in fp32, -inf beyond the vocabulary. Masked by the padded width: an odd one would make loads of 2 bytes."""
    x = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
    return tl.where(column < vocab, x, -float("inf"))


@triton.jit
def _row(
    logits,
    labels,
    ce_out,
    z_out,
    stride,
    vocab,
    columns,
    ignore_index,
    z_loss,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    kept = label != ignore_index
    offsets = tl.arange(0, BLOCK // _EACH)[:, None] * _EACH + tl.arange(0, _EACH)[None, :]
    known = (label >= 0) & (label < vocab)
    # Before the reductions, at which warps wait for each other: afterwards another warp's gradient may be in its place.
    own = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)

    # Every thread has a maximum and a sum of its own until the row is read: nothing is waited for between the loads.
    highs = tl.full([BLOCK // _EACH], -3.0e38, tl.float32)
    totals = tl.zeros([BLOCK // _EACH], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _load(logits, start + offsets, vocab, columns)
        higher = tl.maximum(highs, tl.max(x, 1))
        totals = totals * tl.exp(highs - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        highs = higher
    high = tl.max(highs)
    total = tl.sum(totals * tl.exp(highs - high))
    lse = high + tl.log(total)
    tl.store(ce_out + row, tl.where(kept, lse - own, 0.0))
    tl.store(z_out + row, tl.where(kept, z_loss * lse * lse, 0.0))

    if GRADIENT:
        scale = (1 + 2 * z_loss * lse) / total  # and not exp(x - lse): lse is rounded
        blocks = tl.cdiv(columns, BLOCK)
        for i in range(0, blocks):
            column = (blocks - 1 - i) * BLOCK + offsets
            x = _load(logits, column, vocab, columns)
            g = tl.exp(x - high) * scale - tl.where(column == label, 1.0, 0.0)
            g = tl.where(kept & (column < vocab), g, 0.0)
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=column < columns)


def cross_entropy_(
    logits: Tensor, labels: Tensor, vocab: int, ignore_index: int, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`moda_kernels.cross_entropy.cross_entropy_`."""
    n, columns = logits.shape
    ce, z = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    if n:
        block = min(_BLOCK, triton.next_power_of_2(columns))
        # All of an SM's threads on two rows: what they have read is then still in the L2 when they read it again.
        warps = max(1, min(32, block // 256))
        _row[(n,)](
            logits, labels, ce, z, logits.stride(0), vocab, columns, ignore_index, z_loss,
            GRADIENT=gradient, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return ce, z
