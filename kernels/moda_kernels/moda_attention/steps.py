"""Steps on one tile that the Triton kernels of this package share.

A *row* is one query head of one token. Tiles of rows are ``[BLOCK_M, BLOCK_DIM]`` with the head dim padded to a power of
two; what lies outside a tensor reads as zero. Scores stay in raw units (q . k) and are turned into exponents of two by
one fused multiply-add, ``exp2(s * scale * log2(e) - m)``, so q is never rounded a second time.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634


@triton.jit
def rows_of_tile(
    length, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """What a program of the grid (tiles, Hk, B) owns: whole tokens with the query heads of one key/value head; later tiles first.

    Returns batch, head, first and last token; each row's token and query head; dims; the rows and elements that exist; int64s.
    """
    TOKENS: tl.constexpr = BLOCK_M // PADDED_GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    first = tile * TOKENS
    last = tl.minimum(first + TOKENS, length) - 1
    rows = tl.arange(0, BLOCK_M)
    token = first + rows // PADDED_GROUP
    member = rows % PADDED_GROUP
    d = tl.arange(0, BLOCK_DIM)
    real = (token < length) & (member < GROUP)
    inside = real[:, None] & (d < DIM)[None, :]
    q_head = head * GROUP + member
    return batch, head, first, last, token, q_head, d, real, inside, batch.to(tl.int64), token.to(tl.int64)


@triton.jit
def load_tile(
    x, batch, head, row, stride_b, stride_h, stride_t, n_rows, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``[ROWS, DIM]``: rows ``row..`` of one head of ``x``, a tensor descriptor over (B, H, T, D) or a pointer."""
    if TMA:
        tile = x.load([batch, head, row, 0]).reshape(ROWS, DIM)
    else:
        r = row + tl.arange(0, ROWS)
        d = tl.arange(0, DIM)
        base = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        at = base + r.to(tl.int64)[:, None] * stride_t + d[None, :]
        tile = tl.load(at, mask=(r < n_rows)[:, None] & (d < dim)[None, :], other=0.0)
    return tile


@triton.jit
def load_row_values(x, index, row, row_stride, length, ROWS: tl.constexpr, TMA: tl.constexpr):
    """``[ROWS]`` values of line ``index`` of ``x`` ``[N, row_stride]`` (a descriptor or a pointer), zero past the end."""
    if TMA:
        values = x.load([index, row]).reshape(ROWS)
    else:
        r = row + tl.arange(0, ROWS)
        values = tl.load(x + tl.full([], index, tl.int64) * row_stride + r, mask=r < length, other=0.0)
    return values


@triton.jit
def key_range(
    seq_start, seq_end, first, last, length, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Blocks ``lo .. hi`` of sequence keys that tokens ``first..last`` see; all but those of ``inner .. plain`` need a mask."""
    lo = 0
    hi = length
    if DOCUMENTS:
        lo = tl.load(seq_start + first) // BLOCK_N * BLOCK_N
        hi = tl.load(seq_end + last)
    if CAUSAL:
        hi = last + 1
        plain = (first + 1) // BLOCK_N * BLOCK_N
    elif DOCUMENTS:
        plain = tl.load(seq_end + first) // BLOCK_N * BLOCK_N
    else:
        plain = length // BLOCK_N * BLOCK_N
    inner = lo
    if DOCUMENTS:
        plain = tl.maximum(plain, lo)
        inner = tl.minimum(tl.cdiv(tl.load(seq_start + last), BLOCK_N) * BLOCK_N, plain)
    return lo, inner, plain, hi


@triton.jit
def sees(token, cols, start, end, length, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """``[rows, keys]`` mask of the sequence keys ``cols`` that each row's token sees; start, end: its document."""
    if CAUSAL:
        visible = cols[None, :] <= token[:, None]
    elif DOCUMENTS:
        visible = cols[None, :] < end[:, None]
    else:
        visible = (cols < length)[None, :]
    if DOCUMENTS:
        visible &= cols[None, :] >= start[:, None]
    return visible


@triton.jit
def slot_numbers(table, positions, n_slots):
    """The int64 slot numbers at these positions of the index table of the slots read."""
    return tl.load(table + positions, mask=positions < n_slots, other=0).to(tl.int64)


@triton.jit
def slot_pointers(x, start, stride, offset, number, in_slot, LISTED: tl.constexpr):
    """Where a step's rows of depth tensor ``x`` are: ``offset`` after slot ``start``, or ``in_slot`` after slots ``number``."""
    if LISTED:
        at = x + (in_slot + number * stride)
    else:
        at = x + start * stride + offset
    return at


@triton.jit
def store_or_add(ptrs, value, valid, fresh, ALL_FRESH: tl.constexpr):
    """Write a gradient tile: stored where ``fresh``, added to what is there elsewhere; nothing where not ``valid``."""
    if not ALL_FRESH:  # masked loads would cost no bandwidth, but the room in flight that the other loads need
        value += tl.load(ptrs, mask=valid & ~fresh, other=0.0).to(tl.float32)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=valid)


@triton.jit
def depth_columns(
    n, base, width, table, n_slots, length, token, since,
    BLOCK_N: tl.constexpr, CHUNKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Depth keys n.. of a tile, flattened to (slot, token of the window ``base .. base + width``).

    Returns slot and token (int64) of each column, whether it exists, and the ``[rows, keys]`` mask of what each row sees: its own
    token's slots or, ``CHUNKED``, those of the tokens ``since .. token``. ``LISTED``: slots are read through the index table.
    """
    j = n + tl.arange(0, BLOCK_N)
    slot = j // width
    u = base + j % width
    if CHUNKED:
        visible = (u[None, :] <= token[:, None]) & (u[None, :] >= since[:, None])
    else:
        visible = u[None, :] == token[:, None]
    exists = (slot < n_slots) & (u < length)
    visible &= (slot < n_slots)[None, :]
    if LISTED:
        number = slot_numbers(table, slot, n_slots)
    else:
        number = slot.to(tl.int64)
    return number, u.to(tl.int64), exists, visible


@triton.jit
def softmax_step(s, v, acc, m, den, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein 2018; FlashAttention-2, algorithm 1).

    ``s`` holds raw scores ``[rows, keys]``, -inf where hidden. ``m`` is the running maximum in exponents of two and
    ``den`` the running denominator. A row may have seen no key so far only where ``MASKED``.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    if MASKED:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        base = m_new
    p = tl.math.exp2(s * scale_log2 - base[:, None])
    shrink = tl.math.exp2(m - base)
    den = den * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, den


@triton.jit
def natural_lse(m, den):
    """Natural-log LSE from a maximum in exponents of two and its denominator; ln 2 in two parts, so that it is rounded once."""
    return m * 0.693145751953125 + (m * 1.4286068203094172e-06 + tl.log(den))


@triton.jit
def probabilities(s, lse_log2, scale_log2):
    """Normalised softmax of raw scores; ``lse_log2`` (broadcastable) is the row's LSE in exponents of two."""
    return tl.math.exp2(s * scale_log2 - lse_log2)


@triton.jit
def score_gradients(p, dp, delta):
    """Gradient of the scaled logits: ``p * (dp - delta)`` with ``delta = rowsum(do * o) - grad_lse``."""
    return p * (dp - delta)


def strides(n: int, *tensors: Tensor | None) -> list[int]:
    """The first ``n`` strides of each tensor, zeros for None."""
    return [stride for x in tensors for stride in (n * (0,) if x is None else x.stride()[:n])]


def rows(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def device_of(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def padded(n: int) -> int:
    """A size as the matrix units take it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(n))


def tma_ready(*tensors: Tensor | None) -> bool:
    """Whether Hopper's tensor copy engine can read these tensors: capability 9, 16-byte aligned rows, none expanded."""
    for t in tensors:
        if t is None or t.device.type != "cuda" or torch.cuda.get_device_capability(t.device)[0] < 9:
            return False
        misaligned = (n > 1 and (s == 0 or s * t.element_size() % 16) for n, s in zip(t.shape[:-1], t.stride()[:-1]))
        if t.data_ptr() % 16 or t.stride(-1) != 1 or any(misaligned):
            return False
    return True


def tile_source(x: Tensor | None, rows: int, tma: bool) -> Any:
    """What :func:`load_tile` reads ``x [B, T, H, D]`` from: ``x``, or a descriptor of tiles of ``rows`` tokens of one head."""
    if x is None or not tma:
        return x
    b, t, h, d = x.shape
    # The stride of a dimension of size one is arbitrary and may be misaligned: any legal value will do.
    strides = [s if n > 1 else x.stride(1) * t for n, s in ((b, x.stride(0)), (h, x.stride(2)))]
    token = x.stride(1) if t > 1 else h * d
    strides = [s if (s * x.element_size()) % 16 == 0 else token * t for s in strides]
    return TensorDescriptor(x, [b, h, t, d], [*strides, token, 1], [1, 1, rows, padded(d)])


def row_source(x: Tensor, length: int, rows: int, tma: bool) -> Any:
    """What :func:`load_row_values` reads ``x [N, L]`` from: ``x``, or a descriptor of its first ``length`` columns."""
    if not tma:
        return x
    return TensorDescriptor(x, [x.shape[0], length], [x.stride(0), 1], [1, rows])
