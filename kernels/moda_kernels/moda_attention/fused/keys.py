"""``keys_kernel`` of the fused backend's backward: dk and dv of the sequence, and of chunk-visible depth slots."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import steps
from ..problem import Problem, row_bounds
from ..steps import load_row_values, load_tile, probabilities, score_gradients
from ..tensors import DepthGradients
from ..tiles import Tile, TileChooser
from .forward import launch_options, problem_kind


@triton.jit
def _walk_queries(
    dk, dv, kt, vt, q, grad_out, lse_rows, delta, batch, q_head, key, start, end, lo, hi,
    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, dim, scale_log2,
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
    q, k, v, table, grad_out, grad_k, grad_v, lse_rows, delta, row_start, row_end,
    stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh,
    stride_ks, stride_kb, stride_kt, stride_kh, stride_vs, stride_vb, stride_vt, stride_vh,
    stride_gks, stride_gkb, stride_gkt, stride_gkh, stride_gvs, stride_gvb, stride_gvt, stride_gvh,
    length, row_stride, n_heads, scale, scale_log2, fresh_lo, fresh_hi,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, SLOTS: tl.constexpr, LISTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: one tile of keys of one key/value head. Grid (tiles * slots, Hk, B); early keys have the most queries.

    ``BOUNDED``: ``row_start`` and ``row_end`` limit what each token sees (documents; chunks of depth slots).
    ``SLOTS``: the keys are a depth slot's, whose gradient is stored if it is fresh, else added. ``LISTED``: by the index table.
    """
    if SLOTS:
        n_tiles = tl.cdiv(length, BLOCK_N)
        position = tl.program_id(0) // n_tiles
        first = tl.program_id(0) % n_tiles * BLOCK_N
    else:
        position = 0
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
    if LISTED:
        s64 = tl.load(table + position).to(tl.int64)
    else:
        s64 = tl.full([], position, tl.int64)
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
        for part in tl.static_range(0, 1 if SLOTS else 3 if BOUNDED else 2):
            dk, dv = _walk_queries(
                dk, dv, kt, vt, q, grad_out, lse_rows, delta, batch, q_head, key, start, end, (lo, a, b)[part], (a, b, hi)[part],
                stride_qb, stride_qt, stride_qh, stride_gb, stride_gt, stride_gh, length, row_stride, n_heads, DIM,
                scale_log2, part != 1, CAUSAL, BOUNDED, BLOCK_M, BLOCK_DIM, TMA,
            )  # fmt: skip

    gk_at = grad_k + s64 * stride_gks + b64 * stride_gkb + h64 * stride_gkh + key64 * stride_gkt + d[None, :]
    gv_at = grad_v + s64 * stride_gvs + b64 * stride_gvb + h64 * stride_gvh + key64 * stride_gvt + d[None, :]
    dk = dk * scale
    if SLOTS:
        mine = tl.full([BLOCK_N, 1], position, tl.int32)
        added = inside & ((mine < fresh_lo) | (mine >= fresh_hi))
        dk += tl.load(gk_at, mask=added, other=0.0).to(tl.float32)
        dv += tl.load(gv_at, mask=added, other=0.0).to(tl.float32)
    tl.store(gk_at, dk.to(kt.dtype), mask=inside)
    tl.store(gv_at, dv.to(kt.dtype), mask=inside)


# Rows are queries here. Fastest first at the paper's shapes.
HALF_TILES = (
    Tile(rows=128, keys=64, warps=4, stages=2),
    Tile(rows=64, keys=64, warps=4, stages=2, registers=168),
    Tile(rows=64, keys=64, warps=4, stages=3, registers=168),
)
WIDE_HEAD_TILES = (Tile(rows=64, keys=64, warps=4, stages=2), Tile(rows=64, keys=128, warps=8, stages=2))

_chooser = TileChooser("fused backward, keys", HALF_TILES, WIDE_HEAD_TILES)


def key_gradients(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, stats: Tensor, to: DepthGradients, *, slots: bool
) -> None:
    """Launch :func:`keys_kernel` over ``[S, B, T, Hk, D]`` keys: chunk-visible depth slots, or the sequence as one slot.

    :param q: ``[B, T, Hq, D]`` queries of these keys.
    :param stats: ``[2, B * Hq, L]`` LSE in exponents of two and delta of every row, written by ``rows_kernel``.
    """
    grad_k, grad_v, fresh = to
    table = p.table if slots else None
    start, end = row_bounds(p, depth=slots)
    tma = steps.tma_ready(q, grad_out)

    def launch(tile: Tile) -> None:
        queries, grads = (steps.tile_source(x, tile.rows, tma) for x in (q, grad_out))
        lse, delta = (steps.row_source(x, p.length, tile.rows, tma) for x in stats)
        with steps.device_of(q):
            keys_kernel[(triton.cdiv(p.length, tile.keys) * (p.n_slots if slots else 1), p.n_kv_heads, p.batch)](
                queries, k, v, table, grads, grad_k, grad_v, lse, delta, start, end,
                *steps.strides(3, q, grad_out), *steps.strides(4, k, v, grad_k, grad_v),
                p.length, stats.shape[-1], p.n_heads, p.scale, p.scale * steps.LOG2_E, *fresh,
                CAUSAL=p.causal or slots, BOUNDED=start is not None, SLOTS=slots, LISTED=table is not None,
                **launch_options(p, tile, tma),
            )  # fmt: skip

    if slots:  # not timed, for a second launch would add to the gradients again; chunks are short, so a small tile
        launch(min(_chooser.tiles(p), key=lambda t: t.rows * t.keys))
    else:
        launch(_chooser.choose(problem_kind(p, False, tma=tma), p, launch))
