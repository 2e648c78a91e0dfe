"""Depth forward: every token attends to its own depth slots, merged with the result of the sequence branch.

For a token t and query head h of key/value head k = h // G, with the sequence branch's output o_s and log-sum-exp l_s:

    x_s = scale * q . K_depth[s, t, k]              s = 0 .. S-1
    lse = log(exp(l_s) + sum_s exp(x_s))
    out = exp(l_s - lse) * o_s + sum_s exp(x_s - lse) * V_depth[s, t, k]

This is an online softmax over the slots that starts from (o_s, l_s), or from nothing for depth-only attention. The work is bound
by memory: a slot's K and V are read once, and one warp owns a few heads of one token, so that many independent rows
are in flight. Both products run on the matrix units, whose tiles have 16 query rows: they are filled with the G queries of as
many key/value heads of the token as fit (and padded), logits between different heads being masked. What the masked
part costs is arithmetic that is idle anyway; products on the vector units were measured 8 times slower at G = 8.

Depth tensors are slot-major ``[S, B, T, Hk, D]``: a slot is contiguous, slots may be any distance apart. All of them are read,
or (``LISTED``) those of an index table, at the cost of as many slots in a row.

Slots in fp8 (``QUANTISED``, :mod:`..fp8`) are codes c and scales a: half the bytes. Scales are applied outside of the products:
x_s = scale * a_K[s] * (q . c_K[s]), and the probability of a slot is multiplied by a_V[s] before the product with c_V[s]. The
products are of fp16 (of fp32 for fp32 queries): two e4m3 become fp16, exactly, in one instruction, but bf16 in three, two of them
at a quarter of the rate, which would take longer than the bytes. What codes are multiplied by is brought into the range of fp16:
q by a power of two per row (:func:`half_rows`), probabilities times a_V by the largest a_V of a program (:func:`largest_scale`).

A bias (``BIASED``) is one fp32 number per slot read, the same for all tokens and heads, that is added to its logits.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..steps import padded, slot_numbers, slot_pointers, strides
from ..tensors import Result
from ..tiles import Tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

#: Less than any scale that matters, but what is divided by it is no infinity.
LEAST_UNIT = tl.constexpr(2.0**-40)
#: What a row of zeros is taken to have as its largest number.
LEAST_ROW = tl.constexpr(2.0**-100)
#: Of keys and of values; None where slots are not in fp8.
SlotScales = tuple[Tensor | None, Tensor | None]


@triton.jit
def rows_of_program(T, N_KV_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """(first row, batch, token in its sequence, first kv head) of this program's HEADS rows, all of one token, as int64."""
    row = tl.program_id(0) * HEADS
    token = row // N_KV_HEADS
    return row.to(tl.int64), (token // T).to(tl.int64), (token % T).to(tl.int64), (row % N_KV_HEADS).to(tl.int64)


@triton.jit
def codes_as_half(x, ASSEMBLY: tl.constexpr):
    """e4m3 as fp16. Plain conversions would be moved behind the reads from shared memory, which are then byte by byte where a
    product wants the tile transposed (half as many instructions again); assembly that is not called pure stays where it is, in
    the layout of the load. Triton's interpreter has none."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        return x.to(tl.float16)


@triton.jit
def load_slots(
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, start, n, n_slots, d, row, slot, in_slot, k_offset, v_offset,
    k_slot, v_slot, scale_slot,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, LISTED: tl.constexpr, QUANTISED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """K and V of the next step: positions among the slots read, slot numbers, which elements exist, both tiles (``QUANTISED``:
    codes as fp16), and the scales ``[BLOCK_N]`` of both (1 unless ``QUANTISED``)."""
    position = start + n // HEADS
    valid = (position < n_slots)[:, None]
    if BLOCK_D != D:
        valid = valid & (d < D)[None, :]
    number = slot
    if LISTED:
        number = slot_numbers(table_ptr, position, n_slots)[:, None]
    k_at = slot_pointers(k_ptr, start, k_slot, k_offset, number, in_slot, LISTED)
    k = tl.load(k_at, mask=valid, other=0.0, eviction_policy="evict_first")
    v_at = slot_pointers(v_ptr, start, v_slot, v_offset, number, in_slot, LISTED)
    v = tl.load(v_at, mask=valid, other=0.0, eviction_policy="evict_first")
    if QUANTISED:
        k = codes_as_half(k, ASSEMBLY)
        v = codes_as_half(v, ASSEMBLY)
        if LISTED:
            in_scales = slot_numbers(table_ptr, position, n_slots) * scale_slot
        else:
            in_scales = position.to(tl.int64) * scale_slot
        in_scales += row + n % HEADS
        k_scale = tl.load(k_scale_ptr + in_scales, mask=position < n_slots, other=0.0)
        v_scale = tl.load(v_scale_ptr + in_scales, mask=position < n_slots, other=0.0)
    else:
        k_scale = 1.0
        v_scale = 1.0
    return position, number, valid, k, v, k_scale, v_scale


@triton.jit
def largest_scale(scale_ptr, table_ptr, row, n_slots, scale_slot, HEADS: tl.constexpr, LISTED: tl.constexpr):
    """The largest scale that a program reads: a pass over few bytes, which are in the cache when they are read again."""
    n = tl.arange(0, 256)
    largest = tl.full([256], LEAST_UNIT, dtype=tl.float32)
    for start in tl.range(0, n_slots, 256 // HEADS):
        position = start + n // HEADS
        if LISTED:
            number = slot_numbers(table_ptr, position, n_slots)
        else:
            number = position.to(tl.int64)
        at = scale_ptr + (number * scale_slot + row + n % HEADS)
        largest = tl.maximum(largest, tl.load(at, mask=position < n_slots, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def half_rows(x):
    """``x [M, D]`` in fp16 with its rows' largest in 1 .. 2, and what its rows are to be multiplied by: powers of two, so that
    only bits below 2^-24 of a row's largest can be lost."""
    top = tl.maximum(tl.max(tl.abs(x.to(tl.float32)), 1), LEAST_ROW)
    exponent = top.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return (x.to(tl.float32) * inverse[:, None]).to(tl.float16), exponent.to(tl.float32, bitcast=True)


@triton.jit
def depth_logits(
    q, k, m, n, position, n_slots, scale_log2, G: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr
):
    """``[BLOCK_M, BLOCK_N]`` logits in base 2: query row m is query head m % G of packed head m // G, key row n is a slot of
    packed head n % HEADS, at ``position`` among the slots read. -inf past the last and where the heads differ."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    seen = (position < n_slots)[None, :]
    if HEADS > 1:
        seen = seen & ((m // G)[:, None] == (n % HEADS)[None, :])
    return tl.where(seen, x, float("-inf"))


@triton.jit
def with_bias(x, bias_ptr, position, n_slots, m_mask):
    """Logits ``[BLOCK_M, BLOCK_N]`` in base 2 with the bias of each column's slot; padded rows see nothing."""
    bias = tl.load(bias_ptr + position, mask=position < n_slots, other=0.0) * LOG2_E
    return tl.where(m_mask[:, None], x + bias[None, :], float("-inf"))


@triton.jit
def _depth_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, table_ptr, seq_out_ptr, seq_lse_ptr, out_ptr, lse_ptr,
    T, n_slots, scale_log2, k_slot_stride, v_slot_stride, scale_slot_stride, q_stride_b, q_stride_t, q_stride_h,
    seq_stride_b, seq_stride_t, seq_stride_h, out_stride_b, out_stride_t, out_stride_h,
    N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SEQUENCE: tl.constexpr, LISTED: tl.constexpr, QUANTISED: tl.constexpr, BIASED: tl.constexpr, ASSEMBLY: tl.constexpr,
    ONE_STRIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if ONE_STRIDE:
        v_slot_stride = k_slot_stride
    row, batch, t, head = rows_of_program(T, N_KV_HEADS, HEADS)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m_mask = m < HEADS * G
    md_mask = m_mask[:, None] & (d < D)[None, :]
    heads = head * G + m

    q_offset = batch * q_stride_b + t * q_stride_t + heads[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=md_mask, other=0.0)
    lse_offset = (batch * (N_KV_HEADS * G) + heads) * T + t
    if HAS_SEQUENCE:
        top = tl.load(seq_lse_ptr + lse_offset, mask=m_mask, other=0.0) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        seq_offset = batch * seq_stride_b + t * seq_stride_t + heads[:, None] * seq_stride_h + d[None, :]
        acc = tl.load(seq_out_ptr + seq_offset, mask=md_mask, other=0.0).to(tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    scale_slot = tl.cast(scale_slot_stride, tl.int64)
    if QUANTISED:  # acc is in units of the largest scale of V
        unit = largest_scale(v_scale_ptr, table_ptr, row, n_slots, scale_slot, HEADS, LISTED)
        acc *= 1 / unit
        if q_ptr.dtype.element_ty == tl.float32:
            q_scale = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        else:
            q, q_scale = half_rows(q)
        q_scale *= scale_log2
    STEP: tl.constexpr = BLOCK_N // HEADS
    in_slot = (row + n % HEADS)[:, None] * D + d[None, :]
    slot = (n // HEADS).to(tl.int64)[:, None]
    k_offset = in_slot + slot * k_slot_stride
    v_offset = in_slot + slot * v_slot_stride
    k_slot = tl.cast(k_slot_stride, tl.int64)
    v_slot = tl.cast(v_slot_stride, tl.int64)
    for start in tl.range(0, n_slots, STEP, num_stages=STAGES):
        position, number, valid, k, v, k_scale, v_scale = load_slots(
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, start, n, n_slots, d, row, slot, in_slot, k_offset, v_offset,
            k_slot, v_slot, scale_slot, D, HEADS, BLOCK_D, LISTED, QUANTISED, ASSEMBLY,
        )  # fmt: skip
        if QUANTISED:  # a row's factor joins the subtraction in the exponent
            x = depth_logits(q, k.to(q.dtype), m, n, position, n_slots, k_scale[None, :], G, HEADS, PRECISION)
            if BIASED:
                x = with_bias(x * q_scale[:, None], bias_ptr, position, n_slots, m_mask)
                new_top = tl.maximum(top, tl.max(x, axis=1))
            else:
                new_top = tl.maximum(top, tl.max(x, axis=1) * q_scale)
                x *= q_scale[:, None]
        else:
            x = depth_logits(q, k, m, n, position, n_slots, scale_log2, G, HEADS, PRECISION)
            if BIASED:
                x = with_bias(x, bias_ptr, position, n_slots, m_mask)
            new_top = tl.maximum(top, tl.max(x, axis=1))
        if not HAS_SEQUENCE:  # padded rows never see anything
            base = tl.where(m_mask, new_top, 0.0)
        else:
            base = new_top
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        if QUANTISED:
            p *= (v_scale * (1 / unit))[None, :]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    if QUANTISED:
        acc *= unit
    out_offset = batch * out_stride_b + t * out_stride_t + heads[:, None] * out_stride_h + d[None, :]
    tl.store(out_ptr + out_offset, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=md_mask)
    tl.store(lse_ptr + lse_offset, (top + tl.log2(total)) * LN_2, mask=m_mask)


def slot_layout(x: Tensor) -> tuple[Tensor, int]:
    """A depth tensor whose slots are each contiguous (copied only if they are not), and the distance between slots."""
    if not x[0].is_contiguous():
        x = x.contiguous()
    return x, x.stride(0)


def scale_layout(scales: SlotScales) -> tuple[SlotScales, int]:
    """Scales whose slots are each contiguous and equally far apart, and that distance; 0 where there are none."""
    k, v = scales
    if k is None or v is None:
        return (None, None), 0
    if not (k[0].is_contiguous() and v[0].is_contiguous() and k.stride() == v.stride()):
        k, v = k.contiguous(), v.contiguous()
    return (k, v), k.stride(0)


def packed_heads(n_kv_heads: int, group: int) -> int:
    """How many kv heads of a token share a program: a power of two that divides Hk and gives at most 16 query rows."""
    heads = 1
    while 2 * heads * group <= 16 and n_kv_heads % (2 * heads) == 0:
        heads *= 2
    return heads


def forward_tile(dtype: torch.dtype, block_d: int, quantised: bool = False) -> Tile:
    """The forward tile of a dtype and padded head dim. Slots in fp8 take as many bytes in twice the rows."""
    if dtype == torch.float32:
        return Tile(keys=16, stages=2, warps=2)
    if quantised:
        return Tile(keys=32, stages=2, warps=1) if block_d <= 64 else Tile(keys=16, stages=2, warps=2)
    return Tile(keys=16, stages=2, warps=1) if block_d <= 64 else Tile(keys=16, stages=3, warps=1, registers=128)


def depth_launch(q: Tensor, n_kv_heads: int, tile: Tile) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a depth kernel and the keyword arguments that both kernels take."""
    B, T, Hq, D = q.shape
    G = Hq // n_kv_heads
    heads = tile.heads or packed_heads(n_kv_heads, G)
    sizes = dict(N_KV_HEADS=n_kv_heads, G=G, D=D, HEADS=heads, BLOCK_M=padded(heads * G), BLOCK_D=padded(D))
    assembly = q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1"
    options = dict(BLOCK_N=tile.keys, ASSEMBLY=assembly, PRECISION="ieee", STAGES=tile.stages, **tile.options)
    return (B * T * n_kv_heads // heads,), {**sizes, **options}


def depth_forward(
    q: Tensor, depth_k: Tensor, depth_v: Tensor, scale: float, *, slot_scales: SlotScales = (None, None),
    bias: Tensor | None = None, table: Tensor | None = None, sequence: Result | None = None, tile: Tile | None = None,
) -> Result:  # fmt: skip
    """Attention over depth slots, merged with a sequence part if one is given.

    :param q: ``[B, T, Hq, D]`` depth queries, last dimension contiguous.
    :param depth_k: ``[S, B, T, Hk, D]``, S >= 1; so is ``depth_v``.
    :param slot_scales: fp32 ``[S, B, T, Hk]`` of ``depth_k`` and ``depth_v`` where they are fp8.
    :param bias: fp32 ``[n]``, contiguous: added to the logits of the slots read, in their order.
    :param table: int32 ``[n]`` numbers of the slots that are read; None for all.
    :param sequence: the sequence branch's normalised output, overwritten by the merged one if contiguous, and contiguous fp32
        LSE; None for depth-only attention.

    :returns: the merged output ``[B, T, Hq, D]`` and LSE ``[B, Hq, T]`` fp32 (natural log).
    """
    B, T, Hq, D = q.shape
    n_slots = len(depth_k if table is None else table)
    depth_k, k_slot_stride = slot_layout(depth_k)
    depth_v, v_slot_stride = slot_layout(depth_v)
    out = sequence.out if sequence is not None and sequence.out.is_contiguous() else q.new_empty(q.shape)
    lse = torch.empty((B, Hq, T), dtype=torch.float32, device=q.device)
    so, sl = (out, lse) if sequence is None else sequence
    scales, scale_slot = scale_layout(slot_scales)
    grid, options = depth_launch(q, depth_k.shape[3], tile or forward_tile(q.dtype, padded(D), scale_slot > 0))
    _depth_forward_kernel[grid](
        q, depth_k, depth_v, *scales, bias, table, so, sl, out, lse, T, n_slots, scale * LOG2_E.value, k_slot_stride,
        v_slot_stride, scale_slot, *strides(3, q, so, out), HAS_SEQUENCE=sequence is not None, LISTED=table is not None,
        QUANTISED=scale_slot > 0, BIASED=bias is not None, ONE_STRIDE=k_slot_stride == v_slot_stride, **options,
    )  # fmt: skip
    return Result(out, lse)
