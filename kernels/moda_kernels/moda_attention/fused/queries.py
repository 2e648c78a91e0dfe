"""``queries_kernel`` of the fused backend's backward: dq, arranged as in the forward kernel."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import steps
from ..problem import Problem, row_bounds
from ..steps import depth_columns, key_range, load_tile, probabilities, rows_of_tile, score_gradients, sees
from ..tensors import Inputs
from ..tiles import Tile, TileChooser
from .forward import launch_options, problem_kind


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
    q, q_depth, k, v, depth_k, depth_v, table, grad_out, lse_rows, delta, grad_q_start, grad_q, grad_q_depth,
    seq_start, seq_end, chunk_start,
    stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, stride_gb, stride_gt, stride_gh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_aks, stride_akb, stride_akt, stride_akh, stride_avs, stride_avb, stride_avt, stride_avh,
    length, row_stride, n_slots, n_heads, scale, scale_log2,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SEQUENCE: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, START: tl.constexpr,
    CHUNKED: tl.constexpr, LISTED: tl.constexpr, DEPTH_QUERY: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows, arranged as in the forward kernel. Grid (tiles, Hk, B); longer tiles start first.

    ``START``: the sum begins with ``grad_q_start`` (fp32, unscaled), the term of the tokens' own depth slots.
    ``CHUNKED``: the depth slots of chunks are walked here; with ``DEPTH_QUERY`` their term is the depth query's gradient.
    """
    batch, head, first, last, token, q_head, d, real, inside, b64, t64 = rows_of_tile(
        length, GROUP, PADDED_GROUP, DIM, BLOCK_M, BLOCK_DIM
    )

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
        for part in tl.static_range(0 if DOCUMENTS else 1, 3):  # before, at and after the keys that every row sees
            dq = _walk_keys(
                dq, qt, do, lse, dl, k, v, batch, head, token, start, end, (lo, inner, plain)[part], (inner, plain, hi)[part],
                stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, DIM, scale_log2,
                part != 1, CAUSAL, DOCUMENTS, BLOCK_N, BLOCK_DIM, TMA,
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
            s64, u64, exists, visible = depth_columns(
                n, base, width, table, n_slots, length, token, since, BLOCK_N, True, LISTED
            )
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


# Fastest first at the paper's shapes.
HALF_TILES = (
    Tile(rows=64, keys=64, warps=4, stages=3),
    Tile(rows=128, keys=64, warps=8, stages=3, registers=128),
    Tile(rows=64, keys=64, warps=4, stages=2),
)
WIDE_HEAD_TILES = (Tile(rows=128, keys=64, warps=8, stages=3), Tile(rows=64, keys=64, warps=4, stages=2))

_chooser = TileChooser("fused backward, queries", HALF_TILES, WIDE_HEAD_TILES)


def query_gradients(
    p: Problem, x: Inputs, grad_out: Tensor, stats: Tensor, grad_q_start: Tensor | None, grad_q: Tensor,
    grad_q_depth: Tensor | None,
) -> None:  # fmt: skip
    """Launch :func:`queries_kernel`. ``x`` has depth tensors only where depth is chunk-visible.

    :param stats: as in :func:`.keys.key_gradients`.
    """
    q, k, v, depth_k, depth_v, q_depth = x[:6]
    table = None if depth_k is None else p.table
    padded = triton.next_power_of_2(p.group)
    seq_start, seq_end = row_bounds(p, depth=False)
    chunk_start = None if depth_k is None else row_bounds(p, depth=True)[0]
    tma = steps.tma_ready(k, v)

    def launch(tile: Tile) -> None:
        keys, values = (steps.tile_source(t, tile.keys, tma) for t in (k, v))
        with steps.device_of(q):
            queries_kernel[(triton.cdiv(p.length, tile.rows // padded), p.n_kv_heads, p.batch)](
                q, q_depth, keys, values, depth_k, depth_v, table, grad_out, stats[0], stats[1], grad_q_start,
                grad_q, grad_q_depth, seq_start, seq_end, chunk_start,
                *steps.strides(3, q, q_depth, grad_out, k, v), *steps.strides(4, depth_k, depth_v),
                p.length, stats.shape[-1], p.n_slots, p.n_heads, p.scale, p.scale * steps.LOG2_E,
                PADDED_GROUP=padded, SEQUENCE=k is not None, CAUSAL=p.causal, DOCUMENTS=seq_start is not None,
                START=grad_q_start is not None, CHUNKED=depth_k is not None, LISTED=table is not None,
                DEPTH_QUERY=q_depth is not None, **launch_options(p, tile, tma),
            )  # fmt: skip

    kind = problem_kind(p, q_depth is not None, tma=tma, start=grad_q_start is not None)
    launch(_chooser.choose(kind, p, launch))
