"""Forward of the fused backend: one Triton kernel walks sequence blocks and depth slots under one online softmax.

MoDA paper, algorithm 1. A tile holds ``BLOCK_M`` rows: TOKENS consecutive tokens, each with the GROUP query heads of one
key/value head side by side, so K and V, of the sequence and of the depth slots alike, are read once for the whole group.

    for every block of sequence keys:   (acc, m, l) <- softmax_step(q K^T, V)
    for every block of depth keys:      (acc, m, l) <- softmax_step(q_depth Kd^T hidden unless visible, Vd)
    out = acc / l,  lse = m ln 2 + ln l

Depth keys are flattened to (slot, token of the tile's window); a row sees the columns of its own token (``CHUNKED``: of the
tokens from its chunk's start to itself, the window then reaches back to the first chunk of the tile). With TOKENS = BLOCK_M / G
the share of a block that is used is G / BLOCK_M (the paper's depth utilisation); at 64 rows the matrix work spent on
depth stays below the time its bytes take, so the masked product is not what limits it.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import steps
from ..problem import Problem, row_bounds
from ..steps import depth_columns, key_range, load_tile, natural_lse, rows_of_tile, sees, softmax_step
from ..tensors import Inputs, Result
from ..tiles import Tile, TileChooser


@triton.jit
def _walk_sequence(
    acc, m, den, q, k, v, batch, head, token, start, end, lo, hi,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, dim, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Attend to the keys lo..hi, a multiple of BLOCK_N apart; ``start`` and ``end`` are each row's document."""
    for n in tl.range(lo, hi, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        kt = load_tile(k, batch, head, n, stride_kb, stride_kh, stride_kt, length, dim, BLOCK_N, BLOCK_DIM, TMA)
        s = tl.dot(q, tl.trans(kt), input_precision="ieee")
        if MASKED:
            visible = sees(token, n + tl.arange(0, BLOCK_N), start, end, length, CAUSAL, DOCUMENTS)
            s = tl.where(visible, s, float("-inf"))
        vt = load_tile(v, batch, head, n, stride_vb, stride_vh, stride_vt, length, dim, BLOCK_N, BLOCK_DIM, TMA)
        acc, m, den = softmax_step(s, vt, acc, m, den, scale_log2, MASKED)
    return acc, m, den


@triton.jit
def forward_kernel(
    q, q_depth, k, v, depth_k, depth_v, table, out, lse, seq_start, seq_end, chunk_start,
    stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_aks, stride_akb, stride_akt, stride_akh, stride_avs, stride_avb, stride_avt, stride_avh,
    stride_ob, stride_ot, stride_oh, length, n_slots, n_heads, scale_log2,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEQUENCE: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKED: tl.constexpr, LISTED: tl.constexpr, DEPTH_QUERY: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: one tile of rows of one key/value head. Grid (tiles, Hk, B); later (longer) tiles start first."""
    TOKENS: tl.constexpr = BLOCK_M // PADDED_GROUP
    batch, head, first, last, token, q_head, d, real, inside, b64, t64 = rows_of_tile(
        length, GROUP, PADDED_GROUP, DIM, BLOCK_M, BLOCK_DIM
    )

    acc = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    den = tl.zeros([BLOCK_M], dtype=tl.float32)

    q_at = b64 * stride_qb + t64[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :]
    qt = tl.load(q + q_at, mask=inside, other=0.0)

    if SEQUENCE:
        start = token
        end = token
        lo, inner, plain, hi = key_range(seq_start, seq_end, first, last, length, BLOCK_N, CAUSAL, DOCUMENTS)
        if DOCUMENTS:
            start = tl.load(seq_start + token, mask=token < length, other=0)
            end = tl.load(seq_end + token, mask=token < length, other=0)
        for part in tl.static_range(0 if DOCUMENTS else 1, 3):  # before, at and after the keys that every row sees
            acc, m, den = _walk_sequence(
                acc, m, den, qt, k, v, batch, head, token, start, end, (lo, inner, plain)[part], (inner, plain, hi)[part],
                stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, length, DIM, scale_log2,
                part != 1, CAUSAL, DOCUMENTS, BLOCK_N, BLOCK_DIM, TMA,
            )  # fmt: skip

    if DEPTH:
        if DEPTH_QUERY:
            d_at = b64 * stride_db + t64[:, None] * stride_dt + q_head[:, None] * stride_dh + d[None, :]
            qt = tl.load(q_depth + d_at, mask=inside, other=0.0)
        if CHUNKED:
            since = tl.load(chunk_start + token, mask=token < length, other=0)
            base = tl.load(chunk_start + first)
            width = last + 1 - base
        else:
            since = token
            base = first
            width = TOKENS
        key_base = depth_k + b64 * stride_akb + head.to(tl.int64) * stride_akh
        value_base = depth_v + b64 * stride_avb + head.to(tl.int64) * stride_avh
        for n in tl.range(0, n_slots * width, BLOCK_N):
            s64, u64, exists, visible = depth_columns(
                n, base, width, table, n_slots, length, token, since, BLOCK_N, CHUNKED, LISTED
            )
            there = exists[:, None] & (d < DIM)[None, :]
            k_at = s64[:, None] * stride_aks + u64[:, None] * stride_akt + d[None, :]
            kt = tl.load(key_base + k_at, mask=there, other=0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision="ieee")
            s = tl.where(visible, s, float("-inf"))
            v_at = s64[:, None] * stride_avs + u64[:, None] * stride_avt + d[None, :]
            vt = tl.load(value_base + v_at, mask=there, other=0.0)
            acc, m, den = softmax_step(s, vt, acc, m, den, scale_log2, True)

    acc = acc / den[:, None]
    o_at = b64 * stride_ob + t64[:, None] * stride_ot + q_head[:, None] * stride_oh + d[None, :]
    tl.store(out + o_at, acc.to(out.dtype.element_ty), mask=inside)
    l_at = (b64 * n_heads + q_head) * length + token
    tl.store(lse + l_at, natural_lse(m, den), mask=real)


# Rows x keys, fastest first at the paper's shapes. Fewer rows waste less on depth, more rows re-read K and V less; the caps on
# registers let two or three programs share a multiprocessor, so that one's softmax hides behind another's products.
HALF_TILES = (
    Tile(rows=64, keys=128, warps=4, stages=2),
    Tile(rows=128, keys=128, warps=8, stages=2, registers=128),
    Tile(rows=128, keys=64, warps=4, stages=3),
    Tile(rows=64, keys=64, warps=4, stages=3),
)
WIDE_HEAD_TILES = (
    Tile(rows=64, keys=64, warps=4, stages=3, registers=168),
    Tile(rows=128, keys=64, warps=8, stages=2, registers=128),
    Tile(rows=128, keys=128, warps=8, stages=2),
)
_chooser = TileChooser("fused forward", HALF_TILES, WIDE_HEAD_TILES)


def launch_options(p: Problem, tile: Tile, tma: bool) -> dict[str, Any]:
    """The keyword arguments that every tiled kernel of this backend takes."""
    blocks = dict(BLOCK_DIM=steps.padded(p.head_dim), BLOCK_M=tile.rows, BLOCK_N=tile.keys)
    return dict(GROUP=p.group, DIM=p.head_dim, TMA=tma, **blocks, **tile.options)


def forward(p: Problem, x: Inputs) -> Result:
    """Output and fp32 LSE. Every tensor has a contiguous last dimension."""
    q, k, v, depth_k, depth_v, q_depth = x[:6]
    out = torch.empty(q.shape, dtype=p.dtype, device=p.device)
    lse = torch.empty(p.batch, p.n_heads, p.length, dtype=torch.float32, device=p.device)
    padded = triton.next_power_of_2(p.group)
    seq_start, seq_end = row_bounds(p, depth=False)
    chunk_start, _ = row_bounds(p, depth=True)
    tma = steps.tma_ready(k, v)

    def launch(tile: Tile) -> None:
        keys, values = (steps.tile_source(t, tile.keys, tma) for t in (k, v))
        with steps.device_of(q):
            forward_kernel[(triton.cdiv(p.length, tile.rows // padded), p.n_kv_heads, p.batch)](
                q, q_depth, keys, values, depth_k, depth_v, p.table, out, lse, seq_start, seq_end, chunk_start,
                *steps.strides(3, q, q_depth, k, v), *steps.strides(4, depth_k, depth_v), *steps.strides(3, out),
                p.length, p.n_slots, p.n_heads, p.scale * steps.LOG2_E,
                PADDED_GROUP=padded, SEQUENCE=k is not None, CAUSAL=p.causal, DOCUMENTS=seq_start is not None,
                DEPTH=p.n_slots > 0, CHUNKED=chunk_start is not None, LISTED=p.table is not None,
                DEPTH_QUERY=q_depth is not None, **launch_options(p, tile, tma),
            )  # fmt: skip

    launch(_chooser.choose(problem_kind(p, q_depth is not None), p, launch))
    return Result(out, lse)


def problem_kind(p: Problem, depth_query: bool, **further: bool) -> tuple[int | None, str]:
    """A device's index, and what a tile choice depends on: all that is compiled in, and sizes up to a factor of two."""
    T, S, N = map(triton.next_power_of_2, (p.length, p.n_slots + 1, p.batch * p.n_kv_heads))
    switches = {
        "causal": p.causal, "chunks": p.depth_chunk > 1, "sequence": p.has_sequence, "documents": p.cu_seqlens is not None,
        "list": p.slots is not None, "depth query": depth_query, **further,
    }  # fmt: skip
    sizes = f"{str(p.dtype).removeprefix('torch.')}, D {p.head_dim}, G {p.group}, T {T}, S {S}, rows {N}"
    return p.device.index, ", ".join([sizes, *(name for name, on in switches.items() if on)])
