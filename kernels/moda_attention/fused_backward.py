"""Backward of the fused backend: three kernels, five matrix products for each pair of tiles.

With p = exp(s - lse), dp = do v^T and delta = rowsum(do * o) - grad_lse (FlashAttention-2, section 3.1, and its extension
to a gradient of the LSE), ds = p * (dp - delta):

    dq = ds k * scale,   dk = ds^T q * scale,   dv = p^T do          k, v: of the sequence and of the depth slots alike

* ``rows_kernel``, one program for each token and key/value head: delta; the depth slots of that token, whose gradients it
  owns (stored or added, no atomics); and the first term of dq, which starts the fp32 accumulator.
* ``keys_kernel``, one program for each tile of sequence keys: dk and dv stay in registers over all queries of the group's G
  heads and are written once; the tile's share of dq is added to the accumulator (by the tensor copy engine on Hopper). With
  chunk-visible depth the same kernel walks tiles of depth slots: a chunk's slots are seen as a document's keys are.
* scaling and rounding of dq.

Determinism: dk, dv and the depth gradients of ``depth_chunk = 1`` have the same bits in every run. dq is a sum of fp32 terms in the
order in which key tiles finish, so its last bits may differ from run to run; depth-only attention has no such sum.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl

from .fused_forward import _device_of, _strides, problem_kind, row_bounds
from .problem import Problem
from .tiles import (
    LOG2_E,
    Tile,
    TileChooser,
    load_tile,
    next_power_of_two,
    probabilities,
    score_gradients,
    tma_descriptor,
    tma_ready,
    tma_rows,
)

__all__ = ["backward", "keys_kernel", "rows_kernel"]


@triton.jit
def rows_kernel(
    q, depth_k, depth_v, out, grad_out, lse, grad_lse, lse_log2, delta, grad_q_sum, grad_q, grad_depth_k, grad_depth_v,
    stride_qb, stride_qt, stride_qh,
    stride_aks, stride_akb, stride_akt, stride_akh, stride_avs, stride_avb, stride_avt, stride_avh,
    stride_gks, stride_gkb, stride_gkt, stride_gkh, stride_gvs, stride_gvb, stride_gvt, stride_gvh,
    stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh,
    length, row_stride, n_slots, n_heads, n_kv_heads, scale, scale_log2, fresh_lo, fresh_hi,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    DEPTH: tl.constexpr, LSE_GRADIENT: tl.constexpr, SUM: tl.constexpr, DIRECT: tl.constexpr, PRELOAD: tl.constexpr,
):  # fmt: skip
    """One program: one token and key/value head. Grid (T * Hk, B), heads fastest: neighbours read neighbouring rows.

    ``SUM``: the depth term of dq (zero without one) starts the fp32 accumulator. ``DIRECT``: it is final and is written
    scaled, in dq's dtype (depth-only attention, or the gradient of a depth query).
    """
    token = tl.program_id(0) // n_kv_heads
    head = tl.program_id(0) % n_kv_heads
    batch = tl.program_id(1)
    b64 = batch.to(tl.int64)
    t64 = token.to(tl.int64)
    h64 = head.to(tl.int64)
    member = tl.arange(0, BLOCK_G)
    q_head = head * GROUP + member
    real = member < GROUP
    d = tl.arange(0, BLOCK_DIM)
    inside = real[:, None] & (d < DIM)[None, :]

    o_at = b64 * stride_ob + t64 * stride_ot + q_head[:, None] * stride_oh + d[None, :]
    g_at = b64 * stride_gb + t64 * stride_gt + q_head[:, None] * stride_gh + d[None, :]
    do = tl.load(grad_out + g_at, mask=inside, other=0.0)
    o = tl.load(out + o_at, mask=inside, other=0.0)
    row = (b64 * n_heads + q_head) * length + token
    dl = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if LSE_GRADIENT:
        dl -= tl.load(grad_lse + row, mask=real, other=0.0)
    lse2 = tl.load(lse + row, mask=real, other=float("inf")) * 1.4426950408889634
    if SUM:
        saved = (b64 * n_heads + q_head) * row_stride + token
        tl.store(delta + saved, dl, mask=real)
        tl.store(lse_log2 + saved, lse2, mask=real)

    dq = tl.zeros([BLOCK_G, BLOCK_DIM], dtype=tl.float32)
    if DEPTH:
        q_at = b64 * stride_qb + t64 * stride_qt + q_head[:, None] * stride_qh + d[None, :]
        qt = tl.load(q + q_at, mask=inside, other=0.0)
        k_base = depth_k + b64 * stride_akb + t64 * stride_akt + h64 * stride_akh
        v_base = depth_v + b64 * stride_avb + t64 * stride_avt + h64 * stride_avh
        gk_base = grad_depth_k + b64 * stride_gkb + t64 * stride_gkt + h64 * stride_gkh
        gv_base = grad_depth_v + b64 * stride_gvb + t64 * stride_gvt + h64 * stride_gvh
        for s0 in tl.range(0, n_slots, BLOCK_S):
            slot = s0 + tl.arange(0, BLOCK_S)
            s64 = slot.to(tl.int64)[:, None]
            there = (slot < n_slots)[:, None] & (d < DIM)[None, :]
            kt = tl.load(k_base + s64 * stride_aks + d[None, :], mask=there, other=0.0)
            vt = tl.load(v_base + s64 * stride_avs + d[None, :], mask=there, other=0.0)
            gk_at = gk_base + s64 * stride_gks + d[None, :]
            gv_at = gv_base + s64 * stride_gvs + d[None, :]
            if PRELOAD:
                stored = there & ((slot < fresh_lo) | (slot >= fresh_hi))[:, None]
                old_k = tl.load(gk_at, mask=stored, other=0.0).to(tl.float32)
                old_v = tl.load(gv_at, mask=stored, other=0.0).to(tl.float32)
            s = tl.dot(qt, tl.trans(kt), input_precision="ieee")
            p = probabilities(s, lse2[:, None], scale_log2)
            dp = tl.dot(do, tl.trans(vt), input_precision="ieee")
            ds = score_gradients(p, dp, dl[:, None])
            dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision="ieee")
            gk = tl.dot(tl.trans(ds.to(qt.dtype)), qt, input_precision="ieee") * scale
            gv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            if PRELOAD:
                gk += old_k
                gv += old_v
            tl.store(gk_at, gk.to(kt.dtype), mask=there)
            tl.store(gv_at, gv.to(kt.dtype), mask=there)

    at = ((b64 * length + t64) * n_heads + q_head[:, None]) * DIM + d[None, :]
    if SUM:
        if DIRECT:
            tl.store(grad_q_sum + at, tl.zeros([BLOCK_G, BLOCK_DIM], dtype=tl.float32), mask=inside)
        else:
            tl.store(grad_q_sum + at, dq, mask=inside)
    if DIRECT:
        tl.store(grad_q + at, (dq * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def load_row_values(x, index, row, row_stride, length, ROWS: tl.constexpr, TMA: tl.constexpr):
    """``[ROWS]`` fp32 values of one head's rows, zero past the end (where q and do are zero, so p = 1 adds nothing)."""
    if TMA:
        values = x.load([index, row]).reshape(ROWS)
    else:
        r = row + tl.arange(0, ROWS)
        values = tl.load(x + tl.full([], index, tl.int64) * row_stride + r, mask=r < length, other=0.0)
    return values


@triton.jit
def _walk_queries(
    dk, dv, kt, vt, q, grad_out, grad_q_sum, lse_log2, delta, batch, q_head, key, start, end, lo, hi,
    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh,
    length, row_stride, n_heads, dim, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the queries lo..hi of one head to a tile of keys; scores are kept transposed, ``[keys, queries]``."""
    saved = batch * n_heads + q_head
    for m in tl.range(lo, hi, BLOCK_M):
        m = tl.multiple_of(m, BLOCK_M)
        rows = m + tl.arange(0, BLOCK_M)
        qt = load_tile(q, batch, q_head, m, stride_qb, stride_qh, stride_qt, length, dim, BLOCK_M, BLOCK_DIM, TMA)
        lse2 = load_row_values(lse_log2, saved, m, row_stride, length, BLOCK_M, TMA)
        s = tl.dot(kt, tl.trans(qt), input_precision="ieee")
        p = probabilities(s, lse2[None, :], scale_log2)
        if MASKED:
            visible = (key < length)[:, None]
            if CAUSAL:
                visible &= rows[None, :] >= key[:, None]
            if BOUNDED:
                visible &= rows[None, :] < end[:, None]
                if not CAUSAL:
                    visible &= rows[None, :] >= start[:, None]
            p = tl.where(visible, p, 0.0)
        do = load_tile(
            grad_out, batch, q_head, m, stride_gb, stride_gh, stride_gt, length, dim, BLOCK_M, BLOCK_DIM, TMA
        )
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(vt, tl.trans(do), input_precision="ieee")
        dl = load_row_values(delta, saved, m, row_stride, length, BLOCK_M, TMA)
        ds = score_gradients(p, dp, dl[None, :]).to(qt.dtype)
        dk = tl.dot(ds, qt, dk, input_precision="ieee")
        # Transposed, so that ds is the operand that the matrix unit reads from shared memory; the other way round it is
        # transposed through shared memory and read back into registers first.
        dq = tl.trans(tl.dot(tl.trans(kt), ds, input_precision="ieee"))
        if TMA:
            grad_q_sum.atomic_add([batch, q_head, m, 0], dq.reshape(1, 1, BLOCK_M, BLOCK_DIM))
        else:
            d = tl.arange(0, BLOCK_DIM)
            r64 = batch.to(tl.int64) * length + rows
            at = grad_q_sum + (r64[:, None] * n_heads + q_head) * dim + d[None, :]
            tl.atomic_add(at, dq, mask=(rows < length)[:, None] & (d < dim)[None, :], sem="relaxed")
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, grad_out, grad_q_sum, grad_k, grad_v, lse_log2, delta, row_start, row_end,
    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh,
    stride_ks, stride_kb, stride_kt, stride_kh, stride_vs, stride_vb, stride_vt, stride_vh,
    stride_gks, stride_gkb, stride_gkt, stride_gkh, stride_gvs, stride_gvb, stride_gvt, stride_gvh,
    length, row_stride, n_heads, scale, scale_log2, fresh_lo, fresh_hi,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, SLOTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: one tile of keys of one key/value head. Grid (tiles * slots, Hk, B); early keys have the most queries.

    ``BOUNDED``: ``row_start`` and ``row_end`` limit what each token sees (documents; chunks of depth slots). ``SLOTS``: the keys are
    those of a depth slot, whose gradient is stored if the slot is fresh and else added.
    """
    if SLOTS:
        n_tiles = tl.cdiv(length, BLOCK_N)
        slot = tl.program_id(0) // n_tiles
        first = tl.program_id(0) % n_tiles * BLOCK_N
    else:
        slot = 0
        first = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    batch = tl.program_id(2)
    last = tl.minimum(first + BLOCK_N, length) - 1
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    key = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_DIM)
    inside = (key < length)[:, None] & (d < DIM)[None, :]
    key64 = key.to(tl.int64)[:, None]
    s64 = tl.full([], slot, tl.int64)
    kt = tl.load(
        k + s64 * stride_ks + b64 * stride_kb + h64 * stride_kh + key64 * stride_kt + d[None, :], mask=inside, other=0.0
    )
    vt = tl.load(
        v + s64 * stride_vs + b64 * stride_vb + h64 * stride_vh + key64 * stride_vt + d[None, :], mask=inside, other=0.0
    )

    # Queries lo..a and b..hi need a mask, a..b see every key of the tile (all multiples of BLOCK_M but hi).
    start = key
    end = key
    lo = 0
    hi = length
    if BOUNDED:
        start = tl.load(row_start + key, mask=key < length, other=0)
        end = tl.load(row_end + key, mask=key < length, other=0)
        hi = tl.load(row_end + last)
    if CAUSAL:
        lo = first // BLOCK_M * BLOCK_M
        a = tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    else:
        a = tl.where(first + BLOCK_N > length, length, 0)
        if BOUNDED:
            lo = tl.load(row_start + first) // BLOCK_M * BLOCK_M
            a = tl.maximum(a, tl.cdiv(tl.load(row_start + last), BLOCK_M) * BLOCK_M)
    a = tl.minimum(a, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    b = hi
    if SLOTS:
        a = hi  # a slot's chunks are short: one masked walk
    elif BOUNDED:
        b = tl.maximum(a, tl.load(row_end + first) // BLOCK_M * BLOCK_M)

    dk = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    for member in range(0, GROUP):
        q_head = head * GROUP + member
        dk, dv = _walk_queries(
            dk, dv, kt, vt, q, grad_out, grad_q_sum, lse_log2, delta, batch, q_head, key, start, end, lo, a,
            stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
            scale_log2,
            True, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
        )  # fmt: skip
        if not SLOTS:
            dk, dv = _walk_queries(
                dk, dv, kt, vt, q, grad_out, grad_q_sum, lse_log2, delta, batch, q_head, key, start, end, a, b,
                stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
            scale_log2,
                False, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
            )  # fmt: skip
            if BOUNDED:
                dk, dv = _walk_queries(
                    dk, dv, kt, vt, q, grad_out, grad_q_sum, lse_log2, delta, batch, q_head, key, start, end, b, hi,
                    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
            scale_log2,
                    True, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
                )  # fmt: skip

    gk_at = grad_k + s64 * stride_gks + b64 * stride_gkb + h64 * stride_gkh + key64 * stride_gkt + d[None, :]
    gv_at = grad_v + s64 * stride_gvs + b64 * stride_gvb + h64 * stride_gvh + key64 * stride_gvt + d[None, :]
    dk = dk * scale
    if SLOTS:
        mine = tl.full([BLOCK_N, 1], slot, tl.int32)
        added = inside & ((mine < fresh_lo) | (mine >= fresh_hi))
        dk += tl.load(gk_at, mask=added, other=0.0).to(tl.float32)
        dv += tl.load(gv_at, mask=added, other=0.0).to(tl.float32)
    tl.store(gk_at, dk.to(kt.dtype), mask=inside)
    tl.store(gv_at, dv.to(kt.dtype), mask=inside)


# Queries x keys, fastest first at the paper's shapes.
HALF_TILES = (
    Tile("queries64_keys64", 64, 64, 4, 2, max_registers=168),
    Tile("queries128_keys128", 128, 128, 8, 2),
    Tile("queries64_keys64_deep", 64, 64, 4, 3),
)
WIDE_HEAD_TILES = (
    Tile("queries64_keys128", 64, 128, 8, 1),
    Tile("queries64_keys128_deep", 64, 128, 8, 2),
    Tile("queries64_keys64", 64, 64, 8, 2),
)
SINGLE_TILES = (Tile("queries32_keys32", 32, 32, 4, 1),)
INTERPRETER_TILES = (Tile("queries32_keys32", 32, 32, 1, 1),)

_chooser = TileChooser("fused backward")


def tiles_for(p: Problem) -> Tuple[Tile, ...]:
    """The backward's short list for a problem."""
    if p.device.type != "cuda":
        return INTERPRETER_TILES
    if p.dtype == torch.float32:
        return SINGLE_TILES
    return HALF_TILES if p.head_dim <= 64 else WIDE_HEAD_TILES


def backward(
    p: Problem,
    grad_out: torch.Tensor,
    grad_lse: Optional[torch.Tensor],
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    depth_k: Optional[torch.Tensor],
    depth_v: Optional[torch.Tensor],
    q_depth: Optional[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_depth_k: Optional[torch.Tensor],
    grad_depth_v: Optional[torch.Tensor],
    fresh: Tuple[int, int],
) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """dq, dk, dv and the depth query's gradient; depth gradients go into the buffers (see ``Backend.backward``)."""
    own = p.n_slots > 0 and p.depth_chunk == 1  # a token's slots are its own: rows_kernel does them
    shared = p.n_slots > 0 and p.depth_chunk > 1  # keys_kernel does them
    has_sum = p.has_sequence or shared
    like_q = (p.batch, p.length, p.n_heads, p.head_dim)
    direct = own and (q_depth is not None or not p.has_sequence)
    # LSE in exponents of two and delta, for the keys kernel; rows padded to the 16 bytes that the copy engine asks for.
    row_stride = triton.cdiv(p.length, 4) * 4
    stats = torch.empty(2, p.batch * p.n_heads, row_stride, dtype=torch.float32, device=p.device)
    q_sum = torch.empty(like_q, dtype=torch.float32, device=p.device) if has_sum else None
    q_direct = torch.empty(like_q, dtype=p.dtype, device=p.device) if direct else None
    _rows(
        p, grad_out, grad_lse, q if q_depth is None else q_depth, depth_k, depth_v, out, lse, stats, q_sum, q_direct,
        grad_depth_k, grad_depth_v, fresh, own,
    )  # fmt: skip

    dk = dv = None
    if k is not None and v is not None:
        assert q_sum is not None
        dk = torch.empty(k.shape, dtype=p.dtype, device=p.device)
        dv = torch.empty(k.shape, dtype=p.dtype, device=p.device)
        _keys(p, q, k[None], v[None], grad_out, q_sum, dk[None], dv[None], stats, False, (0, 1))
    depth_sum = q_sum
    if shared:
        assert depth_k is not None and depth_v is not None and grad_depth_k is not None and grad_depth_v is not None
        assert q_sum is not None
        qd = q
        if q_depth is not None:
            qd, depth_sum = q_depth, torch.zeros_like(q_sum)
        assert depth_sum is not None
        _keys(p, qd, depth_k, depth_v, grad_out, depth_sum, grad_depth_k, grad_depth_v, stats, True, fresh)

    def finish(total: Optional[torch.Tensor]) -> torch.Tensor:
        grad = torch.empty(like_q, dtype=p.dtype, device=p.device)
        return grad.zero_() if total is None else torch.mul(total, p.scale, out=grad)

    if q_depth is None:
        return (q_direct if q_direct is not None else finish(q_sum)), dk, dv, None
    dq = finish(q_sum) if p.has_sequence else finish(None)
    return dq, dk, dv, q_direct if q_direct is not None else finish(depth_sum if shared else None)


def _rows(
    p: Problem,
    grad_out: torch.Tensor,
    grad_lse: Optional[torch.Tensor],
    q: torch.Tensor,
    depth_k: Optional[torch.Tensor],
    depth_v: Optional[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    stats: torch.Tensor,
    q_sum: Optional[torch.Tensor],
    q_direct: Optional[torch.Tensor],
    grad_depth_k: Optional[torch.Tensor],
    grad_depth_v: Optional[torch.Tensor],
    fresh: Tuple[int, int],
    own: bool,
) -> None:
    """Launch :func:`rows_kernel`; ``q`` is the query of the depth branch."""
    block_dim = max(16, next_power_of_two(p.head_dim))
    adds = fresh[0] > 0 or fresh[1] < p.n_slots
    wide = block_dim > 64
    tbh, sbth = (0, 1, 2), (0, 1, 2, 3)
    with _device_of(q):
        rows_kernel[(p.length * p.n_kv_heads, p.batch)](
            q, depth_k, depth_v, out, grad_out, lse, grad_lse, stats[0], stats[1], q_sum, q_direct, grad_depth_k,
            grad_depth_v, *_strides(q, tbh), *_strides(depth_k, sbth), *_strides(depth_v, sbth),
            *_strides(grad_depth_k, sbth), *_strides(grad_depth_v, sbth), *_strides(out, tbh),
            *_strides(grad_out, tbh),
            p.length, stats.shape[-1], p.n_slots, p.n_heads, p.n_kv_heads, p.scale, p.scale * LOG2_E, fresh[0], fresh[1],
            GROUP=p.group, DIM=p.head_dim, BLOCK_DIM=block_dim, BLOCK_G=max(16, next_power_of_two(p.group)),
            BLOCK_S=32 if wide and adds else 16, DEPTH=own, LSE_GRADIENT=grad_lse is not None, SUM=q_sum is not None,
            DIRECT=q_direct is not None, PRELOAD=adds,
            num_warps=2 if wide else 1, num_stages=2 if wide else 3,
        )  # fmt: skip


def _keys(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    q_sum: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    stats: torch.Tensor,
    slots: bool,
    fresh: Tuple[int, int],
) -> None:
    """Launch :func:`keys_kernel` over ``[slots, B, T, Hk, D]`` keys: one slot for the sequence."""
    block_dim = max(16, next_power_of_two(p.head_dim))
    start, end = row_bounds(p, depth=slots)
    tma = tma_ready(q, grad_out, q_sum)
    tbh, sbth = (0, 1, 2), (0, 1, 2, 3)

    def launch(tile: Tile, total: torch.Tensor = q_sum) -> None:
        queries, grads, sums, lse2, delta = q, grad_out, total, stats[0], stats[1]  # type: Any, Any, Any, Any, Any
        if tma:
            queries, grads, sums = (tma_descriptor(x, tile.block_m, block_dim) for x in (q, grad_out, total))
            lse2, delta = (tma_rows(x, p.length, tile.block_m) for x in (lse2, delta))
        with _device_of(q):
            keys_kernel[(triton.cdiv(p.length, tile.block_n) * k.shape[0], p.n_kv_heads, p.batch)](
                queries, k, v, grads, sums, grad_k, grad_v, lse2, delta, start, end,
                *_strides(q, tbh), *_strides(grad_out, tbh), *_strides(k, sbth), *_strides(v, sbth),
                *_strides(grad_k, sbth), *_strides(grad_v, sbth),
                p.length, stats.shape[-1], p.n_heads, p.scale, p.scale * LOG2_E, fresh[0], fresh[1],
                GROUP=p.group, DIM=p.head_dim, BLOCK_DIM=block_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                CAUSAL=p.causal or slots, BOUNDED=start is not None, SLOTS=slots, TMA=tma,
                **tile.options,
            )  # fmt: skip

    tiles = tiles_for(p)
    if slots:
        tile = tiles[-1]  # not timed: a second launch would add to the gradients again
    else:
        kind = (*problem_kind(p, False), tma)
        tile = _chooser.choose(kind, tiles, lambda t: launch(t, torch.empty_like(q_sum)), p.device)
    launch(tile)
