"""The flush: depth gradients of several layers, added with one read-modify-write (or store) per slot.

A layer's contribution to a slot is ds_s^T q and p_s^T do (:mod:`.depth_backward`): for several layers this is one matrix product
whose inner dimension is layers * G.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import as_run, slot_table
from ..steps import padded, slot_numbers, slot_pointers, store_or_add
from ..tensors import DepthGradients
from ..tiles import Tile

#: A flush of at most this many slots in a row takes the kernel without matrix products.
FEW_SLOTS = 4
#: Layers times query heads of a group that one flush takes: their q and do stay in shared memory.
MAX_PRODUCTS = 256


@triton.jit
def _flush_kernel(
    p_ptr, ds_ptr, q_ptr, do_ptr, dk_ptr, dv_ptr, table_ptr,
    first, end, fresh_lo, fresh_hi, dk_slot_stride, dv_slot_stride, pending_slots, pending_layer, keep_layer, n_pending,
    N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_FRESH: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Slots ``first <= s < end``, or (``LISTED``) those at these positions of the table. ``fresh`` counts as ``first`` does."""
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
    in_slot = row * D + d[None, :]
    s64 = s.to(tl.int64)[:, None]
    dk_offset = row * D + s64 * dk_slot_stride + d[None, :]
    dv_offset = row * D + s64 * dv_slot_stride + d[None, :]
    dk_slot = tl.cast(dk_slot_stride, tl.int64)
    dv_slot = tl.cast(dv_slot_stride, tl.int64)
    for start in tl.range(first, end, BLOCK_S, num_stages=STAGES):
        position = start + s
        valid = (position < end)[:, None]
        if BLOCK_D != D:
            valid = valid & (d < D)[None, :]
        fresh = ((position >= fresh_lo) & (position < fresh_hi))[:, None]
        number = s
        if LISTED:
            number = slot_numbers(table_ptr, position, end)
            at = layer[:, None] * pending_layer + (token + number[None, :]) * (N_KV_HEADS * G) + in_token
        else:
            at = pending + start * (N_KV_HEADS * G)
        kept = m_mask[:, None] & (position < end)[None, :]
        ds = tl.load(ds_ptr + at, mask=kept, other=0.0)
        p = tl.load(p_ptr + at, mask=kept, other=0.0)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        dk_at = slot_pointers(dk_ptr, start, dk_slot, dk_offset, number[:, None], in_slot, LISTED)
        store_or_add(dk_at, dk, valid, fresh, ALL_FRESH)
        dv = tl.dot(tl.trans(p), do, input_precision=PRECISION)
        dv_at = slot_pointers(dv_ptr, start, dv_slot, dv_offset, number[:, None], in_slot, LISTED)
        store_or_add(dv_at, dv, valid, fresh, ALL_FRESH)


@triton.jit
def _flush_few_kernel(
    p_ptr, ds_ptr, q_ptr, do_ptr, dk_ptr, dv_ptr,
    n_rows, first, fresh_lo, fresh_hi, dk_slot_stride, dv_slot_stride, pending_slots, pending_layer, keep_layer,
    N_PENDING: tl.constexpr, N_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    N_SLOTS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALL_FRESH: tl.constexpr,
):  # fmt: skip
    """The flush for one to four slots in a row, on the vector units: a tile of the matrix unit would be mostly empty. Half the
    grid does dK, half dV, so that a thread's sums leave room for many loads in flight."""
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
            real = r_mask & (tl.full([1], 0, dtype=tl.int32) + i < N_PENDING * G)
            layer = tl.cast(i // G, tl.int64)
            at = layer * keep_layer + (rows[:, None] * G + i % G) * D + d[None, :]
            x = tl.load(x_ptr + at, mask=real[:, None] & d_mask, other=0.0).to(tl.float32)
            weight = weight_ptr + layer * pending_layer + first_weight + i % G
            a0 += tl.load(weight, mask=real, other=0.0).to(tl.float32)[:, None] * x
            if N_SLOTS > 1:
                a1 += tl.load(weight + N_KV_HEADS * G, mask=real, other=0.0).to(tl.float32)[:, None] * x
            if N_SLOTS > 2:
                a2 += tl.load(weight + 2 * N_KV_HEADS * G, mask=real, other=0.0).to(tl.float32)[:, None] * x
            if N_SLOTS > 3:
                a3 += tl.load(weight + 3 * N_KV_HEADS * G, mask=real, other=0.0).to(tl.float32)[:, None] * x
    offset = rows[:, None] * D + d[None, :]
    for j in tl.static_range(N_SLOTS):
        at_slot = tl.full([1, 1], j, dtype=tl.int32) + first
        fresh = (at_slot >= fresh_lo) & (at_slot < fresh_hi)
        to = grad_ptr + tl.cast(first + j, tl.int64) * slot_stride + offset
        store_or_add(to, (a0, a1, a2, a3)[j], mask, fresh, ALL_FRESH)


class LayerProducts:
    """The p, ds, q and do of up to ``layers`` layers, whose depth gradients are still to be added, over ``slots`` slots.

    Memory: ``layers * B * T * Hq * 2 * (slots + D)`` elements, in dtype and sizes those of the queries ``q [B, T, Hq, D]``.
    """

    def __init__(self, layers: int, slots: int, q: Tensor) -> None:
        B, T, Hq, D = q.shape
        self.layers, self.slots = layers, slots
        self.p, self.ds = torch.empty((2, layers, B, T, slots, Hq), dtype=q.dtype, device=q.device).unbind(0)
        self.q, self.do = torch.empty((2, layers, B, T, Hq, D), dtype=q.dtype, device=q.device).unbind(0)

    def flush(
        self, layers: tuple[int, int], slots: tuple[int, ...], to: DepthGradients, *, tile: Tile | None = None
    ) -> None:
        """See ``Pending.flush``. At most ``MAX_PRODUCTS / G`` layers; the slots of ``to``'s buffers are contiguous."""
        B, T, Hq, D = self.q.shape[1:]
        Hk = to.k.shape[3]
        run = as_run(slots)
        first, end = run or (0, len(slots))
        fresh = (first + to.fresh[0], first + to.fresh[1])
        count = layers[1] - layers[0]
        products = count * (Hq // Hk)
        block_d = padded(D)
        kept = [x[layers[0]] for x in (self.p, self.ds, self.q, self.do)]
        sizes = (to.k.stride(0), to.v.stride(0), self.slots, self.p.stride(0), self.q.stride(0))
        all_fresh = to.fresh[0] <= 0 and to.fresh[1] >= len(slots)
        options = dict(N_KV_HEADS=Hk, G=Hq // Hk, D=D, BLOCK_D=block_d, ALL_FRESH=all_fresh)
        if tile is None and run is not None and len(slots) <= FEW_SLOTS:
            block_r = max(1, 1024 // block_d)
            _flush_few_kernel[(triton.cdiv(B * T * Hk, block_r), 2)](
                *kept, to.k, to.v, B * T * Hk, first, *fresh, *sizes,
                N_PENDING=count, N_SLOTS=len(slots), BLOCK_R=block_r, num_warps=4,
                UNROLL=products if products <= 12 else 4,  # all of them in flight where they are few
                **options,
            )  # fmt: skip
            return
        block_m = padded(products)
        tile = tile or flush_tile(self.q.dtype, block_d, block_m)
        _flush_kernel[(B * T * Hk,)](
            *kept, to.k, to.v, None if run is not None else slot_table(slots, to.k.device), first, end, *fresh, *sizes, count,
            BLOCK_M=block_m, BLOCK_S=tile.keys, LISTED=run is None, PRECISION="ieee", STAGES=tile.stages,
            **options, **tile.options,
        )  # fmt: skip


def flush_tile(dtype: torch.dtype, block_d: int, block_m: int) -> Tile:
    """The flush tile of a dtype, a padded head dim and a padded inner dimension (layers times heads of a group)."""
    least = 1 if dtype != torch.float32 and block_d <= 64 else 2
    return Tile(keys=16, stages=2, warps=max(least, min(4, block_m // 16)))
