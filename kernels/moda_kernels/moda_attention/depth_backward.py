"""Depth backward: the depth branch's gradients, from the merged output and log-sum-exp alone.

For a token t and query head h of key/value head k = h // G, with do the gradient of the merged output, lse the merged natural-log
LSE and dlse its gradient (0 unless the caller differentiates it):

    p_s  = exp(scale * q . K[s] - lse)              ds_s = scale * p_s * (do . V[s] - delta)
    delta = do . out - dlse                         dq  += sum_s ds_s * K[s]
    dK[s] = sum over the G heads of ds_s * q        dV[s] = sum over the G heads of p_s * do

Two ways for dK and dV, which are two thirds of the bytes if they are added to what deeper layers left in the buffers:

* immediate: store into *fresh* slots, read-modify-write the others (sum in fp32, rounded once);
* deferred: keep p, ds, q and do (:class:`Pending`) and let :func:`flush` add the contributions of several layers with one
  read-modify-write per slot, a matrix product with inner dimension layers * G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .depth_forward import LOG2_E, Tile, depth_logits, packed_heads, rows_of_program, slot_layout

__all__ = ["MAX_PRODUCTS", "Pending", "backward_tile", "depth_backward", "flush"]

#: A flush of at most this many slots takes the kernel without matrix products.
FEW_SLOTS = 4
#: Layers times query heads of a group that one flush takes: their q and do stay in shared memory.
MAX_PRODUCTS = 256


@triton.jit
def _store_or_add(ptrs, value, valid, fresh, ALL_FRESH: tl.constexpr):
    """Write a gradient tile: stored where ``fresh``, added to what is there elsewhere; nothing where not ``valid``."""
    if not ALL_FRESH:  # masked loads would cost no bandwidth, but the room in flight that the other loads need
        value += tl.load(ptrs, mask=valid & ~fresh, other=0.0).to(tl.float32)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=valid)


@triton.jit
def _depth_backward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr,
    p_ptr, ds_ptr, q_keep_ptr, do_keep_ptr,
    T, n_slots, fresh_lo, fresh_hi, scale,
    k_slot_stride, v_slot_stride, dk_slot_stride, dv_slot_stride, pending_slots, pending_first,
    q_stride_b, q_stride_t, q_stride_h,
    out_stride_b, out_stride_t, out_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h,
    dlse_stride_b, dlse_stride_h, dlse_stride_t,
    N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DLSE: tl.constexpr, ADD_DQ: tl.constexpr, DEFER: tl.constexpr, ALL_FRESH: tl.constexpr, ONE_STRIDE: tl.constexpr,
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
    pending_offset = (token * pending_slots + pending_first + step[None, :]) * (N_KV_HEADS * G) + heads[:, None]
    k_slot = tl.cast(k_slot_stride, tl.int64)
    v_slot = tl.cast(v_slot_stride, tl.int64)
    dk_slot = tl.cast(dk_slot_stride, tl.int64)
    dv_slot = tl.cast(dv_slot_stride, tl.int64)
    for start in tl.range(0, n_slots, STEP, num_stages=STAGES):
        slots = start + n // HEADS
        valid = (slots < n_slots)[:, None]
        if BLOCK_D != D:
            valid = valid & (d < D)[None, :]
        k = tl.load(k_ptr + start * k_slot + k_offset, mask=valid, other=0.0, eviction_policy="evict_first")
        v = tl.load(v_ptr + start * v_slot + v_offset, mask=valid, other=0.0, eviction_policy="evict_first")
        x = depth_logits(q, k, m, n, slots, n_slots, scale * LOG2_E, G, HEADS, PRECISION)
        p = tl.exp2(x - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        p_low = p.to(k.dtype)
        ds_low = ds.to(k.dtype)
        dq = tl.dot(ds_low, k, dq, input_precision=PRECISION)
        if DEFER:
            if HEADS > 1:  # a query row has numbers in the columns of its own head only: adding up the others is exact
                p_low = tl.sum(tl.reshape(p, [BLOCK_M, STEP, HEADS]), axis=2).to(k.dtype)
                ds_low = tl.sum(tl.reshape(ds, [BLOCK_M, STEP, HEADS]), axis=2).to(k.dtype)
            keep_mask = m_mask[:, None] & (start + step < n_slots)[None, :]
            tl.store(p_ptr + pending_offset + start * (N_KV_HEADS * G), p_low, mask=keep_mask)
            tl.store(ds_ptr + pending_offset + start * (N_KV_HEADS * G), ds_low, mask=keep_mask)
        else:
            fresh = ((slots >= fresh_lo) & (slots < fresh_hi))[:, None]
            # Padded query rows are zero, so what p and ds hold there does not matter.
            dv = tl.dot(tl.trans(p_low), do, input_precision=PRECISION)
            _store_or_add(dv_ptr + start * dv_slot + dv_offset, dv, valid, fresh, ALL_FRESH)
            dk = tl.dot(tl.trans(ds_low), q, input_precision=PRECISION)
            _store_or_add(dk_ptr + start * dk_slot + dk_offset, dk, valid, fresh, ALL_FRESH)

    dq_ptrs = dq_ptr + batch * dq_stride_b + t * dq_stride_t + heads[:, None] * dq_stride_h + d[None, :]
    if ADD_DQ:
        dq += tl.load(dq_ptrs, mask=md_mask, other=0.0).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=md_mask)


@triton.jit
def _flush_kernel(
    p_ptr, ds_ptr, q_ptr, do_ptr, dk_ptr, dv_ptr,
    first, end, fresh_lo, fresh_hi, dk_slot_stride, dv_slot_stride, pending_slots, pending_layer, keep_layer, n_pending,
    N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_FRESH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mg = tl.arange(0, BLOCK_M)  # (pending layer, query head of the group)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    layer = (mg // G).to(tl.int64)
    m_mask = mg < n_pending * G
    md_mask = m_mask[:, None] & (d < D)[None, :]
    head = (row * G + mg % G)[:, None]
    keep = layer[:, None] * keep_layer + head * D + d[None, :]
    q = tl.load(q_ptr + keep, mask=md_mask, other=0.0)
    do = tl.load(do_ptr + keep, mask=md_mask, other=0.0)
    in_token = (row % N_KV_HEADS * G + mg % G)[:, None]
    token = row // N_KV_HEADS * pending_slots
    pending = layer[:, None] * pending_layer + (token + s[None, :]) * (N_KV_HEADS * G) + in_token
    s64 = s.to(tl.int64)[:, None]
    dk_offset = row * D + s64 * dk_slot_stride + d[None, :]
    dv_offset = row * D + s64 * dv_slot_stride + d[None, :]
    dk_slot = tl.cast(dk_slot_stride, tl.int64)
    dv_slot = tl.cast(dv_slot_stride, tl.int64)
    for start in tl.range(first, end, BLOCK_S, num_stages=STAGES):
        slots = start + s
        valid = (slots < end)[:, None]
        if BLOCK_D != D:
            valid = valid & (d < D)[None, :]
        fresh = ((slots >= fresh_lo) & (slots < fresh_hi))[:, None]
        at = pending + start * (N_KV_HEADS * G)
        kept = m_mask[:, None] & (slots < end)[None, :]
        ds = tl.load(ds_ptr + at, mask=kept, other=0.0)
        p = tl.load(p_ptr + at, mask=kept, other=0.0)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        _store_or_add(dk_ptr + start * dk_slot + dk_offset, dk, valid, fresh, ALL_FRESH)
        dv = tl.dot(tl.trans(p), do, input_precision=PRECISION)
        _store_or_add(dv_ptr + start * dv_slot + dv_offset, dv, valid, fresh, ALL_FRESH)


@triton.jit
def _flush_few_kernel(
    p_ptr, ds_ptr, q_ptr, do_ptr, dk_ptr, dv_ptr,
    n_rows, first, fresh_lo, fresh_hi, dk_slot_stride, dv_slot_stride, pending_slots, pending_layer, keep_layer,
    N_PENDING: tl.constexpr, N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    N_SLOTS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALL_FRESH: tl.constexpr,
):  # fmt: skip
    """The flush for one to four slots, where a tile of the matrix unit would be mostly empty: sums on the vector units.

    The first half of the grid does dK, the second dV, so that a thread's sums leave room for many loads in flight.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    r_mask = row < n_rows
    first_weight = ((row // N_KV_HEADS).to(tl.int64) * pending_slots + first) * (N_KV_HEADS * G) + row % N_KV_HEADS * G
    d_mask = (d < D)[None, :]
    mask = r_mask[:, None] & d_mask
    if tl.program_id(1) == 0:
        weight_ptr, x_ptr, grad_ptr, slot_stride = ds_ptr, q_ptr, dk_ptr, dk_slot_stride
    else:
        weight_ptr, x_ptr, grad_ptr, slot_stride = p_ptr, do_ptr, dv_ptr, dv_slot_stride
    a0 = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    a1, a2, a3 = a0, a0, a0
    for start in tl.range(0, N_PENDING * G, UNROLL):
        for u in tl.static_range(UNROLL):
            i = start + u
            owed = r_mask & (tl.full([1], 0, dtype=tl.int32) + i < N_PENDING * G)
            layer = tl.cast(i // G, tl.int64)
            at = layer * keep_layer + (rows[:, None] * G + i % G) * D + d[None, :]
            x = tl.load(x_ptr + at, mask=owed[:, None] & d_mask, other=0.0).to(tl.float32)
            weight = weight_ptr + layer * pending_layer + first_weight + i % G
            a0 += tl.load(weight, mask=owed, other=0.0).to(tl.float32)[:, None] * x
            if N_SLOTS > 1:
                a1 += tl.load(weight + N_KV_HEADS * G, mask=owed, other=0.0).to(tl.float32)[:, None] * x
            if N_SLOTS > 2:
                a2 += tl.load(weight + 2 * N_KV_HEADS * G, mask=owed, other=0.0).to(tl.float32)[:, None] * x
            if N_SLOTS > 3:
                a3 += tl.load(weight + 3 * N_KV_HEADS * G, mask=owed, other=0.0).to(tl.float32)[:, None] * x
    offset = rows[:, None] * D + d[None, :]
    for j in tl.static_range(N_SLOTS):
        at_slot = tl.full([1, 1], j, dtype=tl.int32) + first
        fresh = (at_slot >= fresh_lo) & (at_slot < fresh_hi)
        to = grad_ptr + tl.cast(first + j, tl.int64) * slot_stride + offset
        _store_or_add(to, (a0, a1, a2, a3)[j], mask, fresh, ALL_FRESH)


class Pending:
    """What up to ``layers`` layers owe the depth gradients: their p, ds, q and do.

    Memory: ``layers * B * T * Hq * 2 * (slots + D)`` elements of q's dtype.

    :param layers: b, how many layers are kept before their contributions must be flushed.
    :param slots: how many slots p and ds have room for: one more than the highest slot that will be kept.
    """

    def __init__(self, layers: int, slots: int, q: torch.Tensor) -> None:
        B, T, Hq, D = q.shape
        self.layers = layers
        self.slots = slots
        self.p, self.ds = torch.empty((2, layers, B, T, slots, Hq), dtype=q.dtype, device=q.device).unbind(0)
        self.q, self.do = torch.empty((2, layers, B, T, Hq, D), dtype=q.dtype, device=q.device).unbind(0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 2 * (self.p.nbytes + self.q.nbytes)


def backward_tile(dtype: torch.dtype, block_d: int, deferred: bool) -> Tile:
    """The backward tile of a dtype and padded head dim."""
    if dtype == torch.float32 or block_d > 64:
        return Tile(keys=16, stages=2, warps=2)
    return Tile(keys=16, stages=3, warps=1, registers=96) if deferred else Tile(keys=16, stages=2, warps=1)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def depth_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    depth_k: torch.Tensor,
    depth_v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    grad_depth_k: torch.Tensor | None = None,
    grad_depth_v: torch.Tensor | None = None,
    fresh: tuple[int, int] = (0, 0),
    grad_lse: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
    pending: Pending | None = None,
    index: int = 0,
    first_slot: int = 0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Gradients of the depth branch.

    :param grad_out: ``[B, T, Hq, D]`` gradient of the merged output.
    :param q: ``[B, T, Hq, D]`` depth queries.
    :param depth_k: ``[S, B, T, Hk, D]``, S >= 1; so is ``depth_v``.
    :param out: ``[B, T, Hq, D]`` merged output.
    :param lse: ``[B, Hq, T]`` contiguous fp32 merged natural-log LSE.
    :param grad_depth_k: ``[S, B, T, Hk, D]`` written in place, so is ``grad_depth_v``; not looked at with ``pending``.
    :param fresh: slots ``lo <= s < hi`` are stored, the others added to.
    :param grad_lse: ``[B, Hq, T]`` gradient of the LSE, or None.
    :param add_to: ``[B, T, Hq, D]`` to which the query gradient is added in place; a new tensor is returned if None.
    :param pending: defer the depth gradients of this call into ``pending`` at ``index``; slot 0 of this call is slot
        ``first_slot`` there.

    :returns: the query gradient ``[B, T, Hq, D]`` (``add_to`` itself if given).
    """
    B, T, Hq, D = q.shape
    S, Hk = depth_k.shape[0], depth_k.shape[3]
    depth_k, k_slot_stride = slot_layout(depth_k)
    depth_v, v_slot_stride = slot_layout(depth_v)
    q, grad_out, out = _last_contiguous(q), _last_contiguous(grad_out), _last_contiguous(out)
    dq = torch.empty((B, T, Hq, D), dtype=q.dtype, device=q.device) if add_to is None else add_to
    block_d = max(16, triton.next_power_of_2(D))
    tile = tile or backward_tile(q.dtype, block_d, pending is not None)
    if pending is not None:
        keep = (pending.p[index], pending.ds[index], pending.q[index], pending.do[index])
        dk, dv, pending_slots = depth_k, depth_v, pending.slots
    else:
        assert grad_depth_k is not None and grad_depth_v is not None
        dk, dv, pending_slots = grad_depth_k, grad_depth_v, 0
        keep = (q, q, q, q)
    dl = lse if grad_lse is None else grad_lse
    G = Hq // Hk
    heads = tile.heads or packed_heads(Hk, G)
    _depth_backward_kernel[(B * T * Hk // heads,)](
        q, depth_k, depth_v, out, grad_out, lse, dl, dq, dk, dv, *keep,
        T, S, fresh[0], fresh[1], scale,
        k_slot_stride, v_slot_stride, dk.stride(0), dv.stride(0), pending_slots, first_slot,
        q.stride(0), q.stride(1), q.stride(2),
        out.stride(0), out.stride(1), out.stride(2),
        grad_out.stride(0), grad_out.stride(1), grad_out.stride(2),
        dq.stride(0), dq.stride(1), dq.stride(2),
        dl.stride(0), dl.stride(1), dl.stride(2),
        N_KV_HEADS=Hk, G=G, D=D, HEADS=heads, BLOCK_M=max(16, triton.next_power_of_2(heads * G)), BLOCK_N=tile.keys,
        BLOCK_D=block_d, HAS_DLSE=grad_lse is not None, ADD_DQ=add_to is not None, DEFER=pending is not None,
        ALL_FRESH=fresh[0] <= 0 and fresh[1] >= S,
        ONE_STRIDE=k_slot_stride == v_slot_stride == dk.stride(0) == dv.stride(0), PRECISION="ieee",
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return dq


def flush(
    pending: Pending,
    layers: tuple[int, int],
    slots: tuple[int, int],
    grad_depth_k: torch.Tensor,
    grad_depth_v: torch.Tensor,
    fresh: tuple[int, int],
    *,
    tile: Tile | None = None,
) -> None:
    """Add what pending layers owe to a range of slots: one read-modify-write (or store) of each slot.

    :param layers: indices ``lo <= i < hi`` in ``pending``; every one of them must have kept all of ``slots``. At most
        ``MAX_PRODUCTS / G`` of them.
    :param slots: ``lo <= s < hi``, of ``pending`` and of the buffers.
    :param grad_depth_k: ``[S, B, T, Hk, D]``, slots contiguous; so is ``grad_depth_v``.
    :param fresh: slots ``lo <= s < hi`` are stored, the others added to.
    """
    Hk, D = grad_depth_k.shape[3:]
    B, T, Hq = pending.q.shape[1:4]
    first, count = layers[0], layers[1] - layers[0]
    block_d = max(16, triton.next_power_of_2(D))
    all_fresh = fresh[0] <= slots[0] and fresh[1] >= slots[1]
    if tile is None and slots[1] - slots[0] <= FEW_SLOTS:
        n_rows = B * T * Hk
        products = count * (Hq // Hk)  # all of them in flight where they are few
        block_r = max(1, 1024 // block_d)
        _flush_few_kernel[(triton.cdiv(n_rows, block_r), 2)](
            pending.p[first], pending.ds[first], pending.q[first], pending.do[first], grad_depth_k, grad_depth_v,
            n_rows, slots[0], fresh[0], fresh[1], grad_depth_k.stride(0), grad_depth_v.stride(0),
            pending.slots, pending.p.stride(0), pending.q.stride(0),
            N_PENDING=count, N_KV_HEADS=Hk, G=Hq // Hk, D=D, N_SLOTS=slots[1] - slots[0],
            UNROLL=products if products <= 12 else 4, BLOCK_R=block_r, BLOCK_D=block_d,
            ALL_FRESH=all_fresh, num_warps=4,
        )  # fmt: skip
        return
    block_m = max(16, triton.next_power_of_2(count * (Hq // Hk)))
    tile = tile or flush_tile(pending.q.dtype, block_d, block_m)
    _flush_kernel[(B * T * Hk,)](
        pending.p[first], pending.ds[first], pending.q[first], pending.do[first], grad_depth_k, grad_depth_v,
        slots[0], slots[1], fresh[0], fresh[1], grad_depth_k.stride(0), grad_depth_v.stride(0),
        pending.slots, pending.p.stride(0), pending.q.stride(0), count,
        N_KV_HEADS=Hk, G=Hq // Hk, D=D, BLOCK_M=block_m, BLOCK_D=block_d,
        BLOCK_S=tile.keys, ALL_FRESH=all_fresh, PRECISION="ieee", STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def flush_tile(dtype: torch.dtype, block_d: int, block_m: int) -> Tile:
    """The flush tile of a dtype, a padded head dim and a padded inner dimension (layers times heads of a group)."""
    least = 1 if dtype != torch.float32 and block_d <= 64 else 2
    return Tile(keys=16, stages=2, warps=max(least, min(4, block_m // 16)))
