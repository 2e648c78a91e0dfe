"""Backward of the fused backend: three kernels, no atomics, the same bits in every run.

With p = exp(s - lse), dp = do v^T and delta = rowsum(do * o) - grad_lse (FlashAttention-2, section 3.1, and its extension
to a gradient of the LSE), ds = p * (dp - delta):

    dq = ds k * scale,   dk = ds^T q * scale,   dv = p^T do          k, v: of the sequence and of the depth slots alike

* ``rows_kernel``, one program for each token and key/value head: delta; the depth slots of that token, whose gradients it
  owns (stored or added); and the first term of dq. Memory-bound.
* ``keys_kernel``, one program for each tile of keys: dk and dv stay in registers over all queries of the group's G heads and
  are written once. With chunk-visible depth the same kernel walks tiles of depth slots: a chunk's slots are seen as a
  document's keys are.
* ``queries_kernel``, one program for each tile of rows: dq, arranged as in the forward kernel.

The last two recompute p and dp of a pair of tiles: seven matrix products instead of the five of a single pass. Measured on an
H200 the single pass (dq added up in memory by the tensor copy engine) took as long, because ds must cross shared memory for
it, and its dq depended on the order of additions. Here nothing does: every gradient has one owner.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import steps
from ..problem import Problem
from ..steps import probabilities, score_gradients, slot_numbers
from ..tensors import DepthGradients, Gradients, Inputs, Result
from .keys import key_gradients
from .queries import query_gradients


@triton.jit
def rows_kernel(
    q, depth_k, depth_v, table, out, grad_out, lse, grad_lse, lse_rows, delta, grad_q_start, grad_q, grad_depth_k,
    grad_depth_v, stride_qb, stride_qt, stride_qh,
    stride_aks, stride_akb, stride_akt, stride_akh, stride_avs, stride_avb, stride_avt, stride_avh,
    stride_gks, stride_gkb, stride_gkt, stride_gkh, stride_gvs, stride_gvb, stride_gvt, stride_gvh,
    stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh,
    length, row_stride, n_slots, n_heads, n_kv_heads, scale, scale_log2, fresh_lo, fresh_hi,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    DEPTH: tl.constexpr, LISTED: tl.constexpr, LSE_GRADIENT: tl.constexpr, STATS: tl.constexpr, DIRECT: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    """One program: one token and key/value head. Grid (T * Hk, B), heads fastest: neighbours read neighbouring rows.

    ``STATS``: LSE and delta are kept for the other kernels. ``DIRECT``: the depth term of dq is final and is written
    scaled, in dq's dtype (depth-only attention, or a depth query's gradient); else ``queries_kernel`` starts from it.
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
    row_lse = tl.load(lse + row, mask=real, other=float("inf"))
    lse_log2 = row_lse * 1.4426950408889634
    if STATS:
        saved = (b64 * n_heads + q_head) * row_stride + token
        tl.store(delta + saved, dl, mask=real)
        tl.store(lse_rows + saved, lse_log2, mask=real)

    dq = tl.zeros([BLOCK_G, BLOCK_DIM], dtype=tl.float32)
    if DEPTH:
        q_at = b64 * stride_qb + t64 * stride_qt + q_head[:, None] * stride_qh + d[None, :]
        qt = tl.load(q + q_at, mask=inside, other=0.0)
        k_base = depth_k + b64 * stride_akb + t64 * stride_akt + h64 * stride_akh
        v_base = depth_v + b64 * stride_avb + t64 * stride_avt + h64 * stride_avh
        gk_base = grad_depth_k + b64 * stride_gkb + t64 * stride_gkt + h64 * stride_gkh
        gv_base = grad_depth_v + b64 * stride_gvb + t64 * stride_gvt + h64 * stride_gvh
        for s0 in tl.range(0, n_slots, BLOCK_S):
            position = s0 + tl.arange(0, BLOCK_S)
            if LISTED:
                s64 = slot_numbers(table, position, n_slots)[:, None]
            else:
                s64 = position.to(tl.int64)[:, None]
            there = (position < n_slots)[:, None] & (d < DIM)[None, :]
            kt = tl.load(k_base + s64 * stride_aks + d[None, :], mask=there, other=0.0)
            vt = tl.load(v_base + s64 * stride_avs + d[None, :], mask=there, other=0.0)
            gk_at = gk_base + s64 * stride_gks + d[None, :]
            gv_at = gv_base + s64 * stride_gvs + d[None, :]
            if ADDS:
                stored = there & ((position < fresh_lo) | (position >= fresh_hi))[:, None]
                old_k = tl.load(gk_at, mask=stored, other=0.0).to(tl.float32)
                old_v = tl.load(gv_at, mask=stored, other=0.0).to(tl.float32)
            s = tl.dot(qt, tl.trans(kt), input_precision="ieee")
            p = probabilities(s, lse_log2[:, None], scale_log2)
            dp = tl.dot(do, tl.trans(vt), input_precision="ieee")
            ds = score_gradients(p, dp, dl[:, None])
            dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision="ieee")
            gk = tl.dot(tl.trans(ds.to(qt.dtype)), qt, input_precision="ieee") * scale
            gv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            if ADDS:
                gk += old_k
                gv += old_v
            tl.store(gk_at, gk.to(kt.dtype), mask=there)
            tl.store(gv_at, gv.to(kt.dtype), mask=there)

    if DEPTH:
        at = ((b64 * length + t64) * n_heads + q_head[:, None]) * DIM + d[None, :]
        if DIRECT:
            tl.store(grad_q + at, (dq * scale).to(grad_q.dtype.element_ty), mask=inside)
        else:
            tl.store(grad_q_start + at, dq, mask=inside)


def backward(
    p: Problem, grad_out: Tensor, grad_lse: Tensor | None, x: Inputs, saved: Result, depth: DepthGradients | None
) -> Gradients:
    """See ``Backend.backward``. Every tensor has a contiguous last dimension, the LSE and its gradient are contiguous fp32."""
    own = depth if p.depth_chunk == 1 else None  # a token's slots are its own: rows_kernel does them
    shared = depth if p.depth_chunk > 1 else None  # keys_kernel and queries_kernel do them
    direct = own is not None and (x.q_depth is not None or not p.has_sequence)
    dqd = None if x.q_depth is None else torch.empty(x.q.shape, dtype=p.dtype, device=p.device)
    only_depth_query = x.q_depth is not None and not p.has_sequence
    dq = (torch.zeros if only_depth_query else torch.empty)(x.q.shape, dtype=p.dtype, device=p.device)
    start = None if own is None or direct else torch.empty(x.q.shape, dtype=torch.float32, device=p.device)
    stats = None
    if p.has_sequence or shared is not None:  # rows padded to the 16 bytes that the tensor copy engine asks for
        columns = triton.cdiv(p.length, 4) * 4
        stats = torch.empty(2, p.batch * p.n_heads, columns, dtype=torch.float32, device=p.device)
    block_dim = steps.padded(p.head_dim)
    grad_depth_k, grad_depth_v, fresh = (None, None, (0, p.n_slots)) if own is None else own
    adds = fresh[0] > 0 or fresh[1] < p.n_slots
    wide = block_dim > 64
    q = x.depth_query
    with steps.device_of(q):
        rows_kernel[(p.length * p.n_kv_heads, p.batch)](
            q, x.depth_k, x.depth_v, p.table, saved.out, grad_out, saved.lse, grad_lse,
            *((None, None) if stats is None else stats), start, dq if dqd is None else dqd, grad_depth_k, grad_depth_v,
            *steps.strides(3, q), *steps.strides(4, x.depth_k, x.depth_v, grad_depth_k, grad_depth_v),
            *steps.strides(3, saved.out, grad_out),
            p.length, 0 if stats is None else stats.shape[-1], p.n_slots, p.n_heads, p.n_kv_heads,
            p.scale, p.scale * steps.LOG2_E, *fresh,
            GROUP=p.group, DIM=p.head_dim, BLOCK_DIM=block_dim, BLOCK_G=steps.padded(p.group),
            BLOCK_S=32 if wide and adds else 16, DEPTH=own is not None, LISTED=p.table is not None,
            LSE_GRADIENT=grad_lse is not None, STATS=stats is not None, DIRECT=direct, ADDS=adds,
            num_warps=2 if wide else 1, num_stages=2 if wide else 3,
        )  # fmt: skip
    if stats is None:
        return Gradients(dq, None, None, dqd)

    dk = dv = None
    if x.k is not None and x.v is not None:
        dk, dv = (torch.empty(x.k.shape, dtype=p.dtype, device=p.device) for _ in range(2))
        to = DepthGradients(dk[None], dv[None], fresh=(0, 1))
        key_gradients(p, x.q, x.k[None], x.v[None], grad_out, stats, to, slots=False)
    if shared is not None:
        assert x.depth_k is not None and x.depth_v is not None
        key_gradients(p, x.depth_query, x.depth_k, x.depth_v, grad_out, stats, shared, slots=True)
    else:
        x = x._replace(depth_k=None, depth_v=None, q_depth=None)
    query_gradients(p, x, grad_out, stats, start, dq, dqd)
    return Gradients(dq, dk, dv, dqd)
