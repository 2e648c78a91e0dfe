"""Quantisation of a slot's keys and values on a GPU: each read once, codes and scales written once (:mod:`.fp8`)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import fp8
from .quantised import Quantised
from .steps import device_of, rows, strides

LARGEST = tl.constexpr(fp8.LARGEST)
LEAST = tl.constexpr(fp8.LEAST)
ELEMENTS = 2048  # of a program


@triton.jit
def _quantise_kernel(
    k_ptr, v_ptr, k_codes_ptr, v_codes_ptr, k_scale_ptr, v_scale_ptr, n_rows, T,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    N_KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    token = row // N_KV_HEADS
    batch, t, head = (token // T).to(tl.int64), (token % T).to(tl.int64), (row % N_KV_HEADS).to(tl.int64)
    if tl.program_id(1) == 0:
        x_ptr, codes_ptr, scale_ptr = k_ptr, k_codes_ptr, k_scale_ptr
        offset = batch * k_stride_b + t * k_stride_t + head * k_stride_h
    else:
        x_ptr, codes_ptr, scale_ptr = v_ptr, v_codes_ptr, v_scale_ptr
        offset = batch * v_stride_b + t * v_stride_t + head * v_stride_h
    mask = (row < n_rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), tl.full([BLOCK_R], LARGEST, tl.float32)), LEAST)
    codes = tl.div_rn(x, tl.broadcast_to(scale[:, None], [BLOCK_R, BLOCK_D]))  # rounded as PyTorch rounds it
    to = row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(codes_ptr + to, codes.to(codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < n_rows)


def quantise_pair(k: Tensor, v: Tensor, to: Quantised) -> None:
    """Write the codes and scales of ``k`` and ``v [B, T, Hk, D]`` to contiguous ``to``."""
    B, T, Hk, D = k.shape
    k, v = rows(k), rows(v)
    block_d = triton.next_power_of_2(D)
    block_r = max(1, ELEMENTS // block_d)
    with device_of(k):
        _quantise_kernel[(triton.cdiv(B * T * Hk, block_r), 2)](
            k, v, *to, B * T * Hk, T, *strides(3, k, v),
            N_KV_HEADS=Hk, D=D, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
