"""Backward of the fused backend over tiles: ``keys_kernel`` (dk, dv) and ``queries_kernel`` (dq).

Both recompute p = exp(s - lse) and dp = do v^T of a pair of tiles and go on with ds = p * (dp - delta). Seven matrix
products instead of the five of a single pass; measured on an H200 the single pass (dq added up in memory by the tensor copy
engine) took as long, because ds must cross shared memory for it, and its dq depended on the order of additions. Here nothing
does: every gradient has one owner.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .fused_forward import INTERPRETER_TILES, device_of, problem_kind, row_bounds, strides
from .problem import Problem
from .tiles import (
    LOG2_E,
    Tile,
    TileChooser,
    depth_columns,
    key_range,
    load_row_values,
    load_tile,
    next_power_of_two,
    probabilities,
    score_gradients,
    sees,
    tma_descriptor,
    tma_ready,
    tma_rows,
)

__all__ = ["keys", "keys_kernel", "queries", "queries_kernel"]


@triton.jit
def _walk_keys(
    dq, q, do, lse, delta, k, v, batch, head, token, start, end, lo, hi,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, dim, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the sequence keys lo..hi to the dq of a tile of rows."""
    for n in tl.range(lo, hi, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        kt = load_tile(k, batch, head, n, stride_kb, stride_kh, stride_kt, length, dim, BLOCK_N, BLOCK_DIM, TMA)
        vt = load_tile(v, batch, head, n, stride_vb, stride_vh, stride_vt, length, dim, BLOCK_N, BLOCK_DIM, TMA)
        s = tl.dot(q, tl.trans(kt), input_precision="ieee")
        p = probabilities(s, lse[:, None], scale_log2)
        if MASKED:
            p = tl.where(sees(token, n + tl.arange(0, BLOCK_N), start, end, length, CAUSAL, DOCUMENTS), p, 0.0)
        dp = tl.dot(do, tl.trans(vt), input_precision="ieee")
        ds = score_gradients(p, dp, delta[:, None])
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision="ieee")
    return dq


@triton.jit
def queries_kernel(
    q, q_depth, k, v, depth_k, depth_v, grad_out, lse_rows, delta, grad_q_start, grad_q, grad_q_depth,
    seq_start, seq_end, chunk_start,
    stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, stride_gb, stride_gt, stride_gh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_aks, stride_akb, stride_akt, stride_akh, stride_avs, stride_avb, stride_avt, stride_avh,
    length, row_stride, n_slots, n_heads, scale, scale_log2,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEQUENCE: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, START: tl.constexpr,
    CHUNKED: tl.constexpr, DEPTH_QUERY: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows, arranged as in the forward kernel. Grid (tiles, Hk, B); longer tiles start first.

    ``START``: the sum begins with ``grad_q_start`` (fp32, unscaled), the term of the tokens' own depth slots.
    ``CHUNKED``: the depth slots of chunks are walked here; with ``DEPTH_QUERY`` their term is the depth query's gradient.
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
    b64 = batch.to(tl.int64)
    t64 = token.to(tl.int64)

    g_at = b64 * stride_gb + t64[:, None] * stride_gt + q_head[:, None] * stride_gh + d[None, :]
    do = tl.load(grad_out + g_at, mask=inside, other=0.0)
    saved = (b64 * n_heads + q_head) * row_stride + token
    lse = tl.load(lse_rows + saved, mask=real, other=0.0)
    dl = tl.load(delta + saved, mask=real, other=0.0)
    at = ((b64 * length + t64[:, None]) * n_heads + q_head[:, None]) * DIM + d[None, :]
    if START:
        dq = tl.load(grad_q_start + at, mask=inside, other=0.0)
    else:
        dq = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)

    if SEQUENCE:
        q_at = b64 * stride_qb + t64[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :]
        qt = tl.load(q + q_at, mask=inside, other=0.0)
        start = token
        end = token
        lo, inner, plain, hi = key_range(seq_start, seq_end, first, last, length, BLOCK_N, CAUSAL, DOCUMENTS)
        if DOCUMENTS:
            start = tl.load(seq_start + token, mask=token < length, other=0)
            end = tl.load(seq_end + token, mask=token < length, other=0)
            dq = _walk_keys(
                dq, qt, do, lse, dl, k, v, batch, head, token, start, end, lo, inner,
                stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, DIM, scale_log2,
                True, CAUSAL, DOCUMENTS, BLOCK_N, BLOCK_DIM, TMA,
            )  # fmt: skip
        dq = _walk_keys(
            dq, qt, do, lse, dl, k, v, batch, head, token, start, end, inner, plain,
            stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, DIM, scale_log2,
            False, CAUSAL, DOCUMENTS, BLOCK_N, BLOCK_DIM, TMA,
        )  # fmt: skip
        dq = _walk_keys(
            dq, qt, do, lse, dl, k, v, batch, head, token, start, end, plain, hi,
            stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, DIM, scale_log2,
            True, CAUSAL, DOCUMENTS, BLOCK_N, BLOCK_DIM, TMA,
        )  # fmt: skip

    if CHUNKED:
        if DEPTH_QUERY:
            if SEQUENCE:
                tl.store(grad_q + at, (dq * scale).to(grad_q.dtype.element_ty), mask=inside)
                dq = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
            d_at = b64 * stride_db + t64[:, None] * stride_dt + q_head[:, None] * stride_dh + d[None, :]
            qt = tl.load(q_depth + d_at, mask=inside, other=0.0)
        elif not SEQUENCE:
            q_at = b64 * stride_qb + t64[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :]
            qt = tl.load(q + q_at, mask=inside, other=0.0)
        since = tl.load(chunk_start + token, mask=token < length, other=0)
        base = tl.load(chunk_start + first)
        width = last + 1 - base
        key_base = depth_k + b64 * stride_akb + head.to(tl.int64) * stride_akh
        value_base = depth_v + b64 * stride_avb + head.to(tl.int64) * stride_avh
        for n in tl.range(0, n_slots * width, BLOCK_N):
            slot, u, exists, visible = depth_columns(n, base, width, n_slots, length, token, since, BLOCK_N, True)
            s64 = slot.to(tl.int64)
            u64 = u.to(tl.int64)
            there = exists[:, None] & (d < DIM)[None, :]
            k_at = s64[:, None] * stride_aks + u64[:, None] * stride_akt + d[None, :]
            v_at = s64[:, None] * stride_avs + u64[:, None] * stride_avt + d[None, :]
            kt = tl.load(key_base + k_at, mask=there, other=0.0)
            vt = tl.load(value_base + v_at, mask=there, other=0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision="ieee")
            p = tl.where(visible, probabilities(s, lse[:, None], scale_log2), 0.0)
            dp = tl.dot(do, tl.trans(vt), input_precision="ieee")
            ds = score_gradients(p, dp, dl[:, None])
            dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision="ieee")

    dq = dq * scale
    if CHUNKED and DEPTH_QUERY:
        tl.store(grad_q_depth + at, dq.to(grad_q_depth.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_q + at, dq.to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _walk_queries(
    dk, dv, kt, vt, q, grad_out, lse_rows, delta, batch, q_head, key, start, end, lo, hi,
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
        lse = load_row_values(lse_rows, saved, m, row_stride, length, BLOCK_M, TMA)
        s = tl.dot(kt, tl.trans(qt), input_precision="ieee")
        p = probabilities(s, lse[None, :], scale_log2)
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
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, grad_out, grad_k, grad_v, lse_rows, delta, row_start, row_end,
    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh,
    stride_ks, stride_kb, stride_kt, stride_kh, stride_vs, stride_vb, stride_vt, stride_vh,
    stride_gks, stride_gkb, stride_gkt, stride_gkh, stride_gvs, stride_gvb, stride_gvt, stride_gvh,
    length, row_stride, n_heads, scale, scale_log2, fresh_lo, fresh_hi,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, SLOTS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One program: one tile of keys of one key/value head. Grid (tiles * slots, Hk, B); early keys have the most queries.

    ``BOUNDED``: ``row_start`` and ``row_end`` limit what each token sees (documents; chunks of depth slots).
    ``SLOTS``: the keys are those of a depth slot, whose gradient is stored if the slot is fresh and else added.
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
            dk, dv, kt, vt, q, grad_out, lse_rows, delta, batch, q_head, key, start, end, lo, a,
            stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
            scale_log2, True, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
        )  # fmt: skip
        if not SLOTS:
            dk, dv = _walk_queries(
                dk, dv, kt, vt, q, grad_out, lse_rows, delta, batch, q_head, key, start, end, a, b,
                stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
                scale_log2, False, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
            )  # fmt: skip
            if BOUNDED:
                dk, dv = _walk_queries(
                    dk, dv, kt, vt, q, grad_out, lse_rows, delta, batch, q_head, key, start, end, b, hi,
                    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
                    scale_log2, True, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
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


# Queries x keys and rows x keys, fastest first at the paper's shapes.
KEYS_HALF_TILES = (
    Tile("queries128_keys64", 128, 64, 4, 2),
    Tile("queries64_keys64", 64, 64, 4, 2, max_registers=168),
    Tile("queries64_keys64_deep", 64, 64, 4, 3, max_registers=168),
)
KEYS_WIDE_HEAD_TILES = (
    Tile("queries64_keys64", 64, 64, 4, 2),
    Tile("queries64_keys128", 64, 128, 8, 2),
)
QUERIES_HALF_TILES = (
    Tile("rows64_keys64", 64, 64, 4, 3),
    Tile("rows128_keys64", 128, 64, 8, 3, max_registers=128),
    Tile("rows64_keys64_shallow", 64, 64, 4, 2),
)
QUERIES_WIDE_HEAD_TILES = (
    Tile("rows128_keys64", 128, 64, 8, 3),
    Tile("rows64_keys64", 64, 64, 4, 2),
)

_keys_chooser = TileChooser("fused backward, keys")
_queries_chooser = TileChooser("fused backward, queries")


def tiles_for(p: Problem, kernel: str) -> tuple[Tile, ...]:
    """The short list of ``kernel`` ("keys" or "queries") for a problem."""
    if p.device.type != "cuda":
        return INTERPRETER_TILES
    if kernel == "keys":
        return KEYS_HALF_TILES if p.head_dim <= 64 else KEYS_WIDE_HEAD_TILES
    return QUERIES_HALF_TILES if p.head_dim <= 64 else QUERIES_WIDE_HEAD_TILES


def keys(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    stats: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    slots: bool,
    fresh: tuple[int, int],
) -> None:
    """Launch :func:`keys_kernel` over ``[S, B, T, Hk, D]`` keys: chunk-visible depth slots, or the sequence as one slot.

    :param stats: ``[2, B * Hq, L]`` LSE in exponents of two and delta of every row, written by ``rows_kernel``.
    """
    block_dim = max(16, next_power_of_two(p.head_dim))
    start, end = row_bounds(p, depth=slots)
    tma = tma_ready(q, grad_out)
    tbh, sbth = (0, 1, 2), (0, 1, 2, 3)

    def launch(tile: Tile) -> None:
        queries_, grads, lse, delta = q, grad_out, stats[0], stats[1]  # type: Any, Any, Any, Any
        if tma:
            queries_, grads = (tma_descriptor(x, tile.block_m, block_dim) for x in (q, grad_out))
            lse, delta = (tma_rows(x, p.length, tile.block_m) for x in (lse, delta))
        with device_of(q):
            keys_kernel[(triton.cdiv(p.length, tile.block_n) * k.shape[0], p.n_kv_heads, p.batch)](
                queries_, k, v, grads, grad_k, grad_v, lse, delta, start, end,
                *strides(q, tbh), *strides(grad_out, tbh), *strides(k, sbth), *strides(v, sbth),
                *strides(grad_k, sbth), *strides(grad_v, sbth),
                p.length, stats.shape[-1], p.n_heads, p.scale, p.scale * LOG2_E, fresh[0], fresh[1],
                GROUP=p.group, DIM=p.head_dim, BLOCK_DIM=block_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                CAUSAL=p.causal or slots, BOUNDED=start is not None, SLOTS=slots,
                TMA=tma, **tile.options,
            )  # fmt: skip

    tiles = tiles_for(p, "keys")
    if slots:  # not timed, for a second launch would add to the gradients again; chunks are short, so a small tile
        launch(min(tiles, key=lambda t: t.block_m * t.block_n))
    else:
        launch(_keys_chooser.choose((*problem_kind(p, False), tma), tiles, launch, p.device))


def queries(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
    grad_out: torch.Tensor,
    stats: torch.Tensor,
    grad_q_start: torch.Tensor | None,
    grad_q: torch.Tensor,
    grad_q_depth: torch.Tensor | None,
) -> None:
    """Launch :func:`queries_kernel`. ``depth_*`` and ``q_depth`` only where depth is chunk-visible."""
    block_dim = max(16, next_power_of_two(p.head_dim))
    padded = next_power_of_two(p.group)
    seq_start, seq_end = row_bounds(p, depth=False)
    chunk_start = None if depth_k is None else row_bounds(p, depth=True)[0]
    tma = k is not None and v is not None and tma_ready(k, v)
    tbh, sbth = (0, 1, 2), (0, 1, 2, 3)

    def launch(tile: Tile) -> None:
        keys_: Any = k
        values: Any = v
        if tma:
            assert k is not None and v is not None
            keys_, values = (tma_descriptor(x, tile.block_n, block_dim) for x in (k, v))
        with device_of(q):
            queries_kernel[(triton.cdiv(p.length, tile.block_m // padded), p.n_kv_heads, p.batch)](
                q, q_depth, keys_, values, depth_k, depth_v, grad_out, stats[0], stats[1], grad_q_start,
                grad_q, grad_q_depth, seq_start, seq_end, chunk_start,
                *strides(q, tbh), *strides(q_depth, tbh), *strides(grad_out, tbh), *strides(k, tbh), *strides(v, tbh),
                *strides(depth_k, sbth), *strides(depth_v, sbth),
                p.length, stats.shape[-1], p.n_slots, p.n_heads, p.scale, p.scale * LOG2_E,
                GROUP=p.group, PADDED_GROUP=padded, DIM=p.head_dim, BLOCK_DIM=block_dim,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                SEQUENCE=k is not None, CAUSAL=p.causal, DOCUMENTS=seq_start is not None,
                START=grad_q_start is not None, CHUNKED=depth_k is not None, DEPTH_QUERY=q_depth is not None,
                TMA=tma, **tile.options,
            )  # fmt: skip

    kind = (*problem_kind(p, q_depth is not None), tma, grad_q_start is not None)
    launch(_queries_chooser.choose(kind, tiles_for(p, "queries"), launch, p.device))
