"""Sinkhorn's scaling, several matrices a program. The backward pass computes each iteration's matrix again from the first.

That is t (t - 1) / 2 iterations on n^2 numbers in registers, and memory only for reading 2 n^2 numbers and writing n^2.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048  # a program, unless a single matrix has more


@triton.jit
def _load(pointer, n, count, BLOCK: tl.constexpr, N: tl.constexpr):
    """Offsets and mask of a program's matrices ``[BLOCK, N, N]``, rows and columns from n on being padding."""
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i, j = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    return matrix[:, None, None] * n * n + i * n + j, (matrix[:, None, None] < count) & (i < n) & (j < n)


@triton.jit
def _exponentials(logits, offsets, mask):
    x = tl.load(logits + offsets, mask=mask, other=-float("inf"))
    high = tl.max(tl.max(x, 2), 1)
    high = tl.where(high == -float("inf"), 0.0, high)  # no matrix at all
    return tl.exp(x - high[:, None, None])


@triton.jit
def _columns(m):
    total = tl.sum(m, 1)
    return tl.where(total > 0, total, 1.0)[:, None, :]  # padding's sums are zero


@triton.jit
def _rows(m):
    total = tl.sum(m, 2)
    return tl.where(total > 0, total, 1.0)[:, :, None]


@triton.jit
def _iterate(m, iterations):
    for _ in range(0, iterations):
        m = tl.div_rn(m, tl.broadcast_to(_columns(m), m.shape))
        m = tl.div_rn(m, tl.broadcast_to(_rows(m), m.shape))
    return m


@triton.jit
def _forward(logits, out, n, count, iterations, BLOCK: tl.constexpr, N: tl.constexpr):
    offsets, mask = _load(logits, n, count, BLOCK, N)
    tl.store(out + offsets, _iterate(_exponentials(logits, offsets, mask), iterations), mask=mask)


@triton.jit
def _backward(logits, grad, out, n, count, iterations, BLOCK: tl.constexpr, N: tl.constexpr):
    offsets, mask = _load(logits, n, count, BLOCK, N)
    e = _exponentials(logits, offsets, mask)
    g = tl.load(grad + offsets, mask=mask, other=0.0)
    for k in range(0, iterations):
        m = _iterate(e, iterations - 1 - k)
        columns = _columns(m)
        m = m / columns
        rows = _rows(m)
        g = (g - tl.sum(g * (m / rows), 2)[:, :, None]) / rows
        g = (g - tl.sum(g * m, 1)[:, None, :]) / columns
    tl.store(out + offsets, g * e, mask=mask)


def _launch(kernel, iterations: int, logits: Tensor, *others: Tensor) -> Tensor:
    out = torch.empty_like(logits)
    count, n = logits.shape[0], logits.shape[-1]
    N = triton.next_power_of_2(n)
    block = max(1, min(128, _NUMBERS // N**2))
    if count:
        kernel[(triton.cdiv(count, block),)](logits, *others, out, n, count, iterations, BLOCK=block, N=N, num_warps=4)
    return out


def sinkhorn_forward(logits: Tensor, iterations: int) -> Tensor:
    """:param logits: contiguous fp32 ``[matrices, n, n]``."""
    return _launch(_forward, iterations, logits)


def sinkhorn_backward(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    """The gradient of the logits. :param grad: contiguous, of the result."""
    return _launch(_backward, iterations, logits, grad)
