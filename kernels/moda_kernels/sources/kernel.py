"""Sums over sources, a program per few tokens: whole rows in registers, each source's row loaded once for all sums.

A program is one warp (more for wide rows), so that dot products wait for no other. A thread has 16 or 32 numbers of a source, and
as many fp32 ones of each of the c sums (or of their gradients). Rows of sources are loaded some sources ahead. Memory bounds
these kernels; bytes per token, for n sources of width d and numbers of e bytes:

    forward    (n + c) d e          backward of a mix    (3 n + c) d e          of an attention    (3 n + 2 c) d e

The 3 are the source and its gradient read and written (written only, by the reader that comes first). Weights, log-sum-exps and
partial sums are a few per cent.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .stream import Target

_NUMBERS = {1: 32, 2: 16, 4: 16}  # of a source, in a thread, by c: more programs, or more registers
_STAGES = tl.constexpr(3)  # sources under way
# Blocks of rows in a program of attention's backward pass: so many share a partial sum of the queries' gradient.
_BLOCKS = tl.constexpr(16)

# Layers read more and more sources: one compiled kernel for all their numbers.
_VARYING = ["n", "token_stride", "first", "end"]


@triton.jit
def _rows(block, rows, d, R: tl.constexpr, D: tl.constexpr):
    """Numbers of a block's rows ``[1, R]``, which of them are there, and offsets and mask of ``[1, R, D]``."""
    row = block.to(tl.int64) * R + tl.arange(0, R)[None, :]
    column = tl.arange(0, D)[None, None, :]
    there = row < rows
    return row, there, row[:, :, None] * d + column, there[:, :, None] & (column < d)


@triton.jit
def _each(p0, p1, p2, p3, C: tl.constexpr):
    """Pointers ``[C, 1, 1]`` to the first C of up to four tensors."""
    c = tl.arange(0, C)[:, None, None]
    return tl.where(c == 0, p0, tl.where(c == 1, p1, tl.where(c == 2, p2, p3)))


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add(grad, row, rows, mask, value, i, first, end):
    """Add to a source's gradient; store where it has none yet."""
    added = tl.where((i < first) | (i >= end), rows, 0)  # rows that are added to: all, or none
    old = _load(grad, mask & (row < added)[:, :, None])
    tl.store(grad, (old + value).to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _mix(
    x, weights, o0, o1, o2, o3, rows, d, n, stride, token_stride,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, there, offsets, mask = _rows(tl.program_id(0), rows, d, R, D)
    weights += row * token_stride + tl.arange(0, C)[:, None] * n
    total = tl.zeros([C, R, D], tl.float32)
    following = _load(weights, there)
    for i in tl.range(0, n, num_stages=_STAGES):
        w = following
        following = _load(weights + tl.minimum(i + 1, n - 1), there)
        total += w[:, :, None] * _load(x + tl.cast(i, tl.int64) * stride + offsets, mask)
    tl.store(_each(o0, o1, o2, o3, C) + offsets, total.to(o0.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _mix_backward(
    x, weights, g0, g1, g2, g3, grad, grad_weights, rows, d, n, stride, token_stride, first, end,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row, there, offsets, mask = _rows(tl.program_id(0), rows, d, R, D)
    way = tl.arange(0, C)[:, None] * n
    weights += row * token_stride + way
    g = _load(_each(g0, g1, g2, g3, C) + offsets, mask)
    following = _load(weights, there)
    for i in tl.range(0, n, num_stages=_STAGES):
        w = following
        following = _load(weights + tl.minimum(i + 1, n - 1), there)
        source = tl.cast(i, tl.int64) * stride + offsets
        dot = tl.sum(g * _load(x + source, mask), 2)
        _add(grad + source, row, rows, mask, tl.sum(w[:, :, None] * g, 0, keep_dims=True), i, first, end)
        if STATIC:  # a partial sum for each program
            own = tl.program_id(0).to(tl.int64) * C * n + way + i
            tl.store(grad_weights + own, tl.sum(dot, 1, keep_dims=True))
        else:
            own = row * C * n + way + i
            tl.store(grad_weights + own, dot.to(grad_weights.dtype.element_ty), mask=there)


@triton.jit
def _queries(queries, d, root, C: tl.constexpr, D: tl.constexpr):
    """Queries ``[C, 1, D]`` times ``root``, that of d: the norms need not divide by d then."""
    column = tl.arange(0, D)[None, None, :]
    return root * _load(queries + tl.arange(0, C)[:, None, None] * d + column, column < d)


@triton.jit
def _logits(v, q, eps):
    """Logits ``[C, R]`` of sources' rows ``[1, R, D]``, and the norm's scale ``[1, R]``. ``eps`` is d times the norm's."""
    square = tl.sum(v * v, 2) + eps
    scale = tl.rsqrt(square)
    scale *= 1.5 - 0.5 * square * scale * scale  # a GPU's root is right to 22 bits
    return tl.sum(q * v, 2) * scale, scale


@triton.jit(do_not_specialize=_VARYING)
def _attend(
    x, queries, o0, o1, o2, o3, lse, rows, d, n, stride, root, eps,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, there, offsets, mask = _rows(tl.program_id(0), rows, d, R, D)
    q = _queries(queries, d, root, C, D)
    high = tl.full([C, R], -3.0e38, tl.float32)
    norm = tl.zeros([C, R], tl.float32)
    total = tl.zeros([C, R, D], tl.float32)
    for i in tl.range(0, n, num_stages=_STAGES):
        v = _load(x + tl.cast(i, tl.int64) * stride + offsets, mask)
        logit, _ = _logits(v, q, eps)
        higher = tl.maximum(high, logit)
        shrink, p = tl.exp(high - higher), tl.exp(logit - higher)
        norm = norm * shrink + p
        total = total * shrink[:, :, None] + p[:, :, None] * v
        high = higher
    total *= tl.div_rn(tl.full([C, R], 1.0, tl.float32), norm)[:, :, None]
    tl.store(_each(o0, o1, o2, o3, C) + offsets, total.to(o0.dtype.element_ty), mask=mask)
    tl.store(lse + tl.arange(0, C)[:, None] * rows + row, high + tl.log(norm), mask=there)


@triton.jit(do_not_specialize=_VARYING)
def _attend_backward(
    x, queries, o0, o1, o2, o3, lse, g0, g1, g2, g3, grad_lse, grad, grad_queries, rows, d, n, stride, root, eps,
    first, end,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    q = _queries(queries, d, root, C, D)
    of_queries = tl.zeros([C, R, D], tl.float32)
    for k in tl.range(0, _BLOCKS):
        row, there, offsets, mask = _rows(tl.program_id(0) * _BLOCKS + k, rows, d, R, D)
        g = _load(_each(g0, g1, g2, g3, C) + offsets, mask)
        out = _load(_each(o0, o1, o2, o3, C) + offsets, mask)
        at = tl.arange(0, C)[:, None] * rows + row
        log_norm = _load(lse + at, there)
        shift = _load(grad_lse + at, there) - tl.sum(g * out, 2)
        for i in tl.range(0, n, num_stages=_STAGES):
            source = tl.cast(i, tl.int64) * stride + offsets
            v = _load(x + source, mask)
            logit, scale = _logits(v, q, eps)
            p = tl.exp(logit - log_norm)
            d_logit = p * (tl.sum(g * v, 2) + shift)
            d_dot = d_logit * scale
            of_queries += d_dot[:, :, None] * v
            of_norm = tl.sum(d_logit * logit, 0, keep_dims=True) * scale * scale
            value = tl.sum(p[:, :, None] * g + d_dot[:, :, None] * q, 0, keep_dims=True) - of_norm[:, :, None] * v
            _add(grad + source, row, rows, mask, value, i, first, end)
    column = tl.arange(0, D)[None, None, :]
    own = tl.program_id(0).to(tl.int64) * C * d + tl.arange(0, C)[:, None, None] * d + column
    tl.store(grad_queries + own, root * tl.sum(of_queries, 1, keep_dims=True), mask=column < d)


def _tile(x: Tensor, c: int) -> tuple[int, int, dict[str, int]]:
    """Rows, blocks of rows, and what a kernel is compiled with, for c sums of sources ``[n, B, T, d]``."""
    if c not in _NUMBERS:
        raise ValueError(f"sources: expected 1, 2 or 4 sums at once, got {c}")
    rows, wide, of_warp = x.shape[1] * x.shape[2], triton.next_power_of_2(x.shape[3]), 32 * _NUMBERS[c]
    tile = {"C": c, "R": max(1, of_warp // wide), "D": wide, "num_warps": max(1, wide // of_warp)}
    return rows, triton.cdiv(rows, tile["R"]), tile


def _four(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Four pointers for one, two or four tensors."""
    return [*tensors, *[tensors[0]] * (4 - len(tensors))]


def _like(x: Tensor, c: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1:]) for _ in range(c))


class FusedSums:
    """See :class:`moda_kernels.sources.stream.Sums`. Sources are ``[n, B, T, d]``, each contiguous."""

    def mix(self, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        weights, c, n = weights.contiguous(), *weights.shape[-2:]
        out = _like(x, c)
        rows, blocks, tile = _tile(x, c)
        if blocks:
            token = c * n if weights.ndim > 2 else 0
            _mix[(blocks,)](x, weights, *_four(out), rows, x.shape[3], n, x.stride(0), token, **tile)
        return out

    def mix_backward(self, x: Tensor, weights: Tensor, grads: Sequence[Tensor], to: Target) -> Tensor:
        weights, c, n = weights.contiguous(), *weights.shape[-2:]
        rows, blocks, tile = _tile(x, c)
        static = weights.ndim == 2
        assert to.grad.stride() == x.stride()
        partial = x.new_empty(blocks, c, n, dtype=torch.float32) if static else torch.empty_like(weights)
        if blocks:
            _mix_backward[(blocks,)](
                x, weights, *_four([g.contiguous() for g in grads]), to.grad, partial, rows, x.shape[3], n, x.stride(0),
                0 if static else c * n, *to.new, STATIC=static, **tile,
            )  # fmt: skip
        return partial.sum(0).to(weights.dtype) if static else partial

    def attend(self, x: Tensor, queries: Tensor, eps: float) -> tuple[tuple[Tensor, ...], Tensor]:
        c, d = queries.shape
        out, lse = _like(x, c), x.new_empty(c, *x.shape[1:3], dtype=torch.float32)
        rows, blocks, tile = _tile(x, c)
        if blocks:
            _attend[(blocks,)](
                x, queries.float().contiguous(), *_four(out), lse, rows, d, len(x), x.stride(0), d**0.5, d * eps, **tile
            )
        return out, lse

    def attend_backward(
        self, x: Tensor, queries: Tensor, eps: float, out: Sequence[Tensor], lse: Tensor, grads: Sequence[Tensor],
        grad_lse: Tensor, to: Target,
    ) -> Tensor:  # fmt: skip
        c, d = queries.shape
        assert to.grad.stride() == x.stride()
        rows, blocks, tile = _tile(x, c)
        programs = triton.cdiv(blocks, _BLOCKS.value)
        partial = x.new_empty(programs, c, d, dtype=torch.float32)
        if programs:
            _attend_backward[(programs,)](
                x, queries.float().contiguous(), *_four(out), lse, *_four([g.contiguous() for g in grads]),
                grad_lse.contiguous(), to.grad, partial, rows, d, len(x), x.stride(0), d**0.5, d * eps,
                *to.new, **tile,
            )  # fmt: skip
        return partial.sum(0).to(queries.dtype)
