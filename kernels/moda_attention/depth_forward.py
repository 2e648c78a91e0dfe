"""Depth forward: every token attends to its own depth slots, merged with what the sequence branch already found.

For a token t and query head h of key/value head k = h // G, with the sequence branch's output o_s and log-sum-exp l_s:

    x_s = scale * q . K_depth[s, t, k]              s = 0 .. S-1
    lse = log(exp(l_s) + sum_s exp(x_s))
    out = exp(l_s - lse) * o_s + sum_s exp(x_s - lse) * V_depth[s, t, k]

This is an online softmax over the slots that starts from (o_s, l_s), or from nothing for depth-only attention. The work is bound
by memory: a slot's K and V are read once, and one warp owns one (token, key/value head) so that many independent rows
are in flight. The G queries of a row are padded to 16 rows, so that both products run on the matrix units: the padding costs
arithmetic that is idle anyway, while products on the vector units were measured 8 times slower at G = 8.

Depth tensors are slot-major ``[S, B, T, Hk, D]``: a slot is contiguous, slots may be any distance apart.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

__all__ = ["Tile", "depth_forward", "forward_tile", "slot_layout"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """How a depth kernel is cut: slots of one step, software pipeline depth, warps of a program."""

    slots: int
    stages: int
    warps: int
    registers: Optional[int] = None  # cap a thread's registers, so that more programs fit on a multiprocessor


@triton.jit
def row_of_program(T, N_KV_HEADS: tl.constexpr):
    """(row, batch, token in its sequence, kv head) of this program, as int64 except the head."""
    pid = tl.program_id(0)
    head = pid % N_KV_HEADS
    token = pid // N_KV_HEADS
    return pid.to(tl.int64), (token // T).to(tl.int64), (token % T).to(tl.int64), head


@triton.jit
def depth_logits(q, k, slots, n_slots, scale_log2, PRECISION: tl.constexpr):
    """``[BLOCK_G, BLOCK_S]`` logits in base 2 of padded queries against a tile of slots; -inf past the last slot."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    return tl.where((slots < n_slots)[None, :], x, float("-inf"))


@triton.jit
def _depth_forward_kernel(
    q_ptr, k_ptr, v_ptr, seq_out_ptr, seq_lse_ptr, out_ptr, lse_ptr,
    T, n_slots, scale_log2, k_slot_stride, v_slot_stride,
    q_stride_b, q_stride_t, q_stride_h,
    seq_stride_b, seq_stride_t, seq_stride_h,
    out_stride_b, out_stride_t, out_stride_h,
    N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_SEQUENCE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, batch, t, head = row_of_program(T, N_KV_HEADS)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    g_mask = g < G
    gd_mask = g_mask[:, None] & (d < D)[None, :]
    heads = (head * G + g).to(tl.int64)

    q_offset = batch * q_stride_b + t * q_stride_t + heads[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=gd_mask, other=0.0)
    lse_offset = (batch * (N_KV_HEADS * G) + heads) * T + t
    if HAS_SEQUENCE:
        m = tl.load(seq_lse_ptr + lse_offset, mask=g_mask, other=0.0) * LOG2_E
        total = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
        seq_offset = batch * seq_stride_b + t * seq_stride_t + heads[:, None] * seq_stride_h + d[None, :]
        acc = tl.load(seq_out_ptr + seq_offset, mask=gd_mask, other=0.0).to(tl.float32)
    else:
        m = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_G], dtype=tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)

    k_offset = row * D + s.to(tl.int64)[:, None] * k_slot_stride + d[None, :]
    v_offset = row * D + s.to(tl.int64)[:, None] * v_slot_stride + d[None, :]
    k_slot = tl.cast(k_slot_stride, tl.int64)
    v_slot = tl.cast(v_slot_stride, tl.int64)
    for start in tl.range(0, n_slots, BLOCK_S, num_stages=STAGES):
        slots = start + s
        kv_mask = (slots < n_slots)[:, None]
        if BLOCK_D != D:
            kv_mask = kv_mask & (d < D)[None, :]
        k = tl.load(k_ptr + start * k_slot + k_offset, mask=kv_mask, other=0.0, eviction_policy="evict_first")
        v = tl.load(v_ptr + start * v_slot + v_offset, mask=kv_mask, other=0.0, eviction_policy="evict_first")
        x = depth_logits(q, k, slots, n_slots, scale_log2, PRECISION)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        p = tl.exp2(x - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new

    out_offset = batch * out_stride_b + t * out_stride_t + heads[:, None] * out_stride_h + d[None, :]
    tl.store(out_ptr + out_offset, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=gd_mask)
    tl.store(lse_ptr + lse_offset, (m + tl.log2(total)) * LN_2, mask=g_mask)


def slot_layout(x: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """A depth tensor whose slots are each contiguous (copied only if they are not), and the distance between slots."""
    if not x[0].is_contiguous():
        x = x.contiguous()
    return x, x.stride(0)


def forward_tile(dtype: torch.dtype, block_d: int) -> Tile:
    """The forward tile of a dtype and padded head dim."""
    return Tile(slots=16, stages=2, warps=1)


def depth_forward(
    q: torch.Tensor,
    depth_k: torch.Tensor,
    depth_v: torch.Tensor,
    scale: float,
    *,
    seq_out: Optional[torch.Tensor] = None,
    seq_lse: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    tile: Optional[Tile] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention over depth slots, merged with a sequence part if one is given.

    :param q: ``[B, T, Hq, D]`` depth queries, last dimension contiguous.
    :param depth_k: ``[S, B, T, Hk, D]``, S >= 1.
    :param depth_v: ``[S, B, T, Hk, D]``.
    :param seq_out: ``[B, T, Hq, D]`` normalised output of the sequence branch, or None for depth-only attention.
    :param seq_lse: ``[B, Hq, T]`` contiguous fp32 natural-log LSE of the sequence branch.
    :param out: where the output goes; may be ``seq_out`` itself. A new tensor if None.

    :returns: the merged output ``[B, T, Hq, D]`` and LSE ``[B, Hq, T]`` fp32 (natural log).
    """
    B, T, Hq, D = q.shape
    S, Hk = depth_k.shape[0], depth_k.shape[3]
    depth_k, k_slot_stride = slot_layout(depth_k)
    depth_v, v_slot_stride = slot_layout(depth_v)
    if out is None:
        out = torch.empty((B, T, Hq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hq, T), dtype=torch.float32, device=q.device)
    so = out if seq_out is None else seq_out
    sl = lse if seq_lse is None else seq_lse
    block_d = max(16, triton.next_power_of_2(D))
    tile = tile or forward_tile(q.dtype, block_d)
    _depth_forward_kernel[(B * T * Hk,)](
        q, depth_k, depth_v, so, sl, out, lse,
        T, S, scale * LOG2_E.value, k_slot_stride, v_slot_stride,
        q.stride(0), q.stride(1), q.stride(2),
        so.stride(0), so.stride(1), so.stride(2),
        out.stride(0), out.stride(1), out.stride(2),
        N_KV_HEADS=Hk, G=Hq // Hk, D=D, BLOCK_G=max(16, triton.next_power_of_2(Hq // Hk)), BLOCK_D=block_d,
        BLOCK_S=tile.slots, HAS_SEQUENCE=seq_out is not None, PRECISION="ieee", STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return out, lse
