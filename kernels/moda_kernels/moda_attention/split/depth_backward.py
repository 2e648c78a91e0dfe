"""Depth backward: the depth branch's gradients, from the merged output and log-sum-exp alone.

For a token t and query head h of key/value head k = h // G, with do the gradient of the merged output, lse the merged natural-log
LSE and dlse its gradient (0 unless the caller differentiates it):

    p_s  = exp(scale * q . K[s] - lse)              ds_s = scale * p_s * (do . V[s] - delta)
    delta = do . out - dlse                         dq  += sum_s ds_s * K[s]
    dK[s] = sum over the G heads of ds_s * q        dV[s] = sum over the G heads of p_s * do

The gradient of a bias is the sum of ds_s / scale over tokens and heads: each program leaves its own sum, and they are added up
in a fixed order.

Two ways for dK and dV, which are two thirds of the bytes if they are added to what deeper layers left in the buffers:

* immediate: store into *fresh* slots, read-modify-write the others (sum in fp32, rounded once);
* deferred: keep p, ds, q and do, and let :mod:`.flush` add the contributions of several layers with one read-modify-write
  per slot.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..steps import padded, rows, slot_numbers, slot_pointers, store_or_add, strides
from ..tensors import Deferred, DepthGradients, Result
from ..tiles import Tile
from .depth_forward import (
    LEAST_ROW,
    LOG2_E,
    SlotScales,
    depth_launch,
    depth_logits,
    half_rows,
    largest_scale,
    load_slots,
    rows_of_program,
    scale_layout,
    slot_layout,
    with_bias,
)
from .flush import LayerProducts


@triton.jit
def _depth_backward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr,
    k_scale_ptr, v_scale_ptr, bias_ptr, dbias_ptr, table_ptr, p_ptr, ds_ptr, q_keep_ptr, do_keep_ptr,
    T, n_slots, fresh_lo, fresh_hi, scale,
    k_slot_stride, v_slot_stride, scale_slot_stride, dk_slot_stride, dv_slot_stride, pending_slots, pending_first,
    q_stride_b, q_stride_t, q_stride_h, out_stride_b, out_stride_t, out_stride_h, do_stride_b, do_stride_t, do_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, dlse_stride_b, dlse_stride_h, dlse_stride_t,
    N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DLSE: tl.constexpr, ADD_DQ: tl.constexpr, DEFER: tl.constexpr, ALL_FRESH: tl.constexpr, LISTED: tl.constexpr,
    QUANTISED: tl.constexpr, BIASED: tl.constexpr, ASSEMBLY: tl.constexpr, ONE_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if ONE_STRIDE:  # one set of 64-bit offsets instead of four: about 24 registers, and with them a third more warps
        v_slot_stride = k_slot_stride
        dk_slot_stride = k_slot_stride
        dv_slot_stride = k_slot_stride
    row, batch, t, head = rows_of_program(T, N_KV_HEADS, HEADS)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m_mask = m < HEADS * G
    md_mask = m_mask[:, None] & (d < D)[None, :]
    heads = head * G + m

    q_offset = batch * q_stride_b + t * q_stride_t + heads[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=md_mask, other=0.0)
    do_offset = batch * do_stride_b + t * do_stride_t + heads[:, None] * do_stride_h + d[None, :]
    do = tl.load(do_ptr + do_offset, mask=md_mask, other=0.0)
    out_offset = batch * out_stride_b + t * out_stride_t + heads[:, None] * out_stride_h + d[None, :]
    out = tl.load(out_ptr + out_offset, mask=md_mask, other=0.0)
    lse = tl.load(lse_ptr + (batch * (N_KV_HEADS * G) + heads) * T + t, mask=m_mask, other=0.0) * LOG2_E
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    if HAS_DLSE:
        dlse_offset = batch * dlse_stride_b + heads * dlse_stride_h + t * dlse_stride_t
        delta -= tl.load(dlse_ptr + dlse_offset, mask=m_mask, other=0.0).to(tl.float32)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if DEFER:
        keep = (row * G + m)[:, None] * D + d[None, :]
        tl.store(q_keep_ptr + keep, q, mask=md_mask)
        tl.store(do_keep_ptr + keep, do, mask=md_mask)

    scale_slot = tl.cast(scale_slot_stride, tl.int64)
    if QUANTISED:
        if q_ptr.dtype.element_ty == tl.float32:
            q_half, do_half = q, do
            q_scale = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
            do_scale = q_scale
        else:
            q_half, q_scale = half_rows(q)
            do_half, do_scale = half_rows(do)
        # |do . V| <= 2 D do_scale 448 v_unit: in these units ds * a_K is at most 2^15, the largest that D <= 128 allows in fp16.
        v_unit = largest_scale(v_scale_ptr, table_ptr, row, n_slots, scale_slot, HEADS, LISTED)
        k_unit = largest_scale(k_scale_ptr, table_ptr, row, n_slots, scale_slot, HEADS, LISTED)
        ds_unit = tl.maximum(tl.maximum(do_scale * v_unit * 448, tl.abs(delta)), LEAST_ROW) * (scale / 128)
        do_scale *= scale / ds_unit
        delta *= scale / ds_unit
        q_scale *= scale * LOG2_E
    STEP: tl.constexpr = BLOCK_N // HEADS
    step = tl.arange(0, STEP)
    in_slot = (row + n % HEADS)[:, None] * D + d[None, :]
    slot = (n // HEADS).to(tl.int64)[:, None]
    k_offset = in_slot + slot * k_slot_stride
    v_offset = in_slot + slot * v_slot_stride
    dk_offset = in_slot + slot * dk_slot_stride
    dv_offset = in_slot + slot * dv_slot_stride
    # p and ds of a token are [slot, query head]: what a program keeps of a slot is contiguous
    token = row // N_KV_HEADS
    pending_slot = token * pending_slots + pending_first
    pending_offset = (pending_slot + step[None, :]) * (N_KV_HEADS * G) + heads[:, None]
    k_slot = tl.cast(k_slot_stride, tl.int64)
    v_slot = tl.cast(v_slot_stride, tl.int64)
    dk_slot = tl.cast(dk_slot_stride, tl.int64)
    dv_slot = tl.cast(dv_slot_stride, tl.int64)
    for start in tl.range(0, n_slots, STEP, num_stages=STAGES):
        position, number, valid, k, v, k_scale, v_scale = load_slots(
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, start, n, n_slots, d, row, slot, in_slot, k_offset, v_offset,
            k_slot, v_slot, scale_slot, D, HEADS, BLOCK_D, LISTED, QUANTISED, ASSEMBLY,
        )  # fmt: skip
        if QUANTISED:
            k = k.to(q_half.dtype)
            x = depth_logits(q_half, k, m, n, position, n_slots, k_scale[None, :], G, HEADS, PRECISION)
            x *= q_scale[:, None]
            if BIASED:
                x = with_bias(x, bias_ptr, position, n_slots, m_mask)
            p = tl.exp2(x - lse[:, None])
            dp = tl.dot(do_half, tl.trans(v.to(do_half.dtype)), input_precision=PRECISION) * v_scale[None, :]
            ds = p * (dp * do_scale[:, None] - delta[:, None])  # in units of ds_unit
            dq = tl.dot((ds * (k_scale * (1 / k_unit))[None, :]).to(k.dtype), k, dq, input_precision=PRECISION)
        else:
            x = depth_logits(q, k, m, n, position, n_slots, scale * LOG2_E, G, HEADS, PRECISION)
            if BIASED:
                x = with_bias(x, bias_ptr, position, n_slots, m_mask)
            p = tl.exp2(x - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None]) * scale
        if BIASED:
            dbias = ds
            if QUANTISED:
                dbias = ds * ds_unit[:, None]
            dbias = tl.sum(tl.reshape(tl.sum(dbias, axis=0), [STEP, HEADS]), axis=1)
            at = tl.program_id(0).to(tl.int64) * n_slots + start + step
            tl.store(dbias_ptr + at, dbias, mask=start + step < n_slots)
        p_low = p.to(q.dtype)
        if QUANTISED and not (DEFER and HEADS > 1):
            ds_low = (ds * ds_unit[:, None]).to(q.dtype)
        elif not QUANTISED:
            ds_low = ds.to(q.dtype)
            dq = tl.dot(ds_low, k, dq, input_precision=PRECISION)
        if DEFER:
            if HEADS > 1:  # a query row has numbers in the columns of its own head only: adding up the others is exact
                p_low = tl.sum(tl.reshape(p, [BLOCK_M, STEP, HEADS]), axis=2).to(q.dtype)
                ds_low = tl.sum(tl.reshape(ds, [BLOCK_M, STEP, HEADS]), axis=2)
                if QUANTISED:
                    ds_low *= ds_unit[:, None]
                ds_low = ds_low.to(q.dtype)
            keep_mask = m_mask[:, None] & (start + step < n_slots)[None, :]
            if LISTED:
                kept = pending_slot + slot_numbers(table_ptr, start + step, n_slots)[None, :]
                kept = kept * (N_KV_HEADS * G) + heads[:, None]
                tl.store(p_ptr + kept, p_low, mask=keep_mask)
                tl.store(ds_ptr + kept, ds_low, mask=keep_mask)
            else:
                tl.store(p_ptr + pending_offset + start * (N_KV_HEADS * G), p_low, mask=keep_mask)
                tl.store(ds_ptr + pending_offset + start * (N_KV_HEADS * G), ds_low, mask=keep_mask)
        else:
            fresh = ((position >= fresh_lo) & (position < fresh_hi))[:, None]
            # Padded query rows are zero, so what p and ds hold there does not matter.
            dv = tl.dot(tl.trans(p_low), do, input_precision=PRECISION)
            dv_at = slot_pointers(dv_ptr, start, dv_slot, dv_offset, number, in_slot, LISTED)
            store_or_add(dv_at, dv, valid, fresh, ALL_FRESH)
            dk = tl.dot(tl.trans(ds_low), q, input_precision=PRECISION)
            dk_at = slot_pointers(dk_ptr, start, dk_slot, dk_offset, number, in_slot, LISTED)
            store_or_add(dk_at, dk, valid, fresh, ALL_FRESH)

    if QUANTISED:
        dq *= (ds_unit * k_unit)[:, None]
    dq_ptrs = dq_ptr + batch * dq_stride_b + t * dq_stride_t + heads[:, None] * dq_stride_h + d[None, :]
    if ADD_DQ:
        dq += tl.load(dq_ptrs, mask=md_mask, other=0.0).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=md_mask)


def backward_tile(dtype: torch.dtype, block_d: int, deferred: bool, quantised: bool = False) -> Tile:
    """The backward tile of a dtype and padded head dim."""
    if dtype == torch.float32 or block_d > 64:
        return Tile(keys=16, stages=2, warps=2)
    registers = 128 if quantised else 96
    return Tile(keys=16, stages=3, warps=1, registers=registers) if deferred else Tile(keys=16, stages=2, warps=1)


def depth_backward(
    grad_out: Tensor, q: Tensor, depth_k: Tensor, depth_v: Tensor, merged: Result, scale: float,
    depth: DepthGradients | Deferred, *, slot_scales: SlotScales = (None, None), bias: Tensor | None = None,
    grad_bias: Tensor | None = None, table: Tensor | None = None, grad_lse: Tensor | None = None, add_to: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Gradients of the depth branch.

    :param grad_out: ``[B, T, Hq, D]`` gradient of the merged output. :param q: ``[B, T, Hq, D]`` depth queries.
    :param depth_k: ``[S, B, T, Hk, D]``, S >= 1; so is ``depth_v``. :param merged: merged output and contiguous fp32 LSE.
    :param depth: buffers ``[S, B, T, Hk, D]`` that take the gradients of depth_k and depth_v (in fp8, of what their codes and
        scales stand for), or where they are left for a later flush.
    :param slot_scales: fp32 ``[S, B, T, Hk]`` of ``depth_k`` and ``depth_v`` where they are fp8.
    :param bias: fp32 ``[n]`` that was added to the logits. :param grad_bias: takes its gradient, the same.
    :param table: int32 ``[n]`` numbers of the slots that were read; None for all.
    :param grad_lse: ``[B, Hq, T]`` gradient of the LSE, or None.
    :param add_to: ``[B, T, Hq, D]`` to which the query gradient is added in place; a new tensor is returned if None.

    :returns: the query gradient ``[B, T, Hq, D]`` (``add_to`` itself if given).
    """
    n_slots = len(depth_k if table is None else table)
    depth_k, k_slot_stride = slot_layout(depth_k)
    depth_v, v_slot_stride = slot_layout(depth_v)
    q, grad_out, out = map(rows, (q, grad_out, merged.out))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if add_to is None else add_to
    if isinstance(depth, Deferred):
        pending, at, first_slot = depth
        assert isinstance(pending, LayerProducts)
        keep = (pending.p[at], pending.ds[at], pending.q[at], pending.do[at])
        dk, dv, pending_slots, fresh = depth_k, depth_v, pending.slots, (0, 0)
    else:
        dk, dv, fresh = depth
        keep, pending_slots, first_slot = (q, q, q, q), 0, 0
    scales, scale_slot = scale_layout(slot_scales)
    dl = merged.lse if grad_lse is None else grad_lse
    deferred = isinstance(depth, Deferred)
    tile = tile or backward_tile(q.dtype, padded(q.shape[3]), deferred, scale_slot > 0)
    grid, options = depth_launch(q, depth_k.shape[3], tile)
    parts = None if bias is None else torch.empty((*grid, n_slots), dtype=torch.float32, device=q.device)
    _depth_backward_kernel[grid](
        q, depth_k, depth_v, out, grad_out, merged.lse, dl, dq, dk, dv, *scales, bias, parts, table, *keep, q.shape[1], n_slots,
        *fresh, scale, k_slot_stride, v_slot_stride, scale_slot, dk.stride(0), dv.stride(0), pending_slots, first_slot,
        *strides(3, q, out, grad_out, dq, dl), HAS_DLSE=grad_lse is not None, ADD_DQ=add_to is not None, DEFER=deferred,
        ALL_FRESH=fresh[0] <= 0 and fresh[1] >= n_slots, LISTED=table is not None,
        QUANTISED=scale_slot > 0, BIASED=bias is not None,
        ONE_STRIDE=k_slot_stride == v_slot_stride == dk.stride(0) == dv.stride(0), **options,
    )  # fmt: skip
    if parts is not None:
        assert grad_bias is not None
        torch.sum(parts, 0, out=grad_bias).div_(scale)
    return dq
