"""The split backend: the device's best flash attention for the sequence, a memory-bound Triton kernel for depth.

The two are merged exactly by log-sum-exp: the depth kernel's online softmax starts from the sequence branch's output and LSE,
and the sequence kernel's own backward is given the merged pair (:mod:`.sequence`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from . import sequence
from .depth_backward import Pending, depth_backward
from .depth_forward import depth_forward
from .problem import Problem

__all__ = ["Deferred", "backward", "forward", "name", "unsupported"]

name = "split"

HEAD_DIMS = range(8, 129, 8)


class Deferred(NamedTuple):
    """Where a backward pass leaves its depth gradients instead of adding them: layer ``at`` of ``pending``."""

    pending: Pending
    at: int
    first_slot: int  # what the call's slot 0 is there


def unsupported(p: Problem) -> str | None:
    """Why this backend cannot solve ``p``, naming the argument, or None if it can."""
    if p.device.type != "cuda" and not (p.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"device {p.device.type}: split needs a CUDA device"
    if p.depth_chunk != 1:
        return f"depth_chunk {p.depth_chunk}: split's depth kernels see a token's own slots only"
    if p.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {p.dtype}: split takes float16 and bfloat16, and float32 without a sequence branch"
    if p.head_dim not in HEAD_DIMS:
        return f"head dim {p.head_dim}: split takes multiples of 8 up to 128"
    return sequence.why_none(p) if p.has_sequence else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, T, Hq, D]`` in q's dtype and natural-log LSE ``[B, Hq, T]`` fp32. Bitwise reproducible."""
    q = _rows(q)
    out = lse = None
    if k is not None and v is not None:
        out, lse = sequence.choose(p).forward(p, q, _rows(k), _rows(v))
        lse = lse.contiguous()
        if p.n_slots == 0:
            return out.contiguous(), lse
    assert depth_k is not None and depth_v is not None
    return depth_forward(
        q if q_depth is None else _rows(q_depth), depth_k, depth_v, p.scale,
        seq_out=out, seq_lse=lse, out=out if out is not None and out.is_contiguous() else None,
    )  # fmt: skip


def backward(
    p: Problem,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_depth_k: torch.Tensor | None,
    grad_depth_v: torch.Tensor | None,
    fresh: tuple[int, int],
    deferred: Deferred | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v and q_depth; the depth gradients go into the given buffers, or into ``deferred``.

    The depth part is bitwise reproducible; the sequence part is as its kernel is (cuDNN and flash attention add up dq in
    no fixed order).
    """
    q, grad_out = _rows(q), _rows(grad_out)
    dq = dk = dv = None
    if k is not None and v is not None:
        k, v = _rows(k), _rows(v)
        kernel = sequence.choose(p)
        dq, dk, dv = kernel.backward(p, grad_out, q, k, v, out, lse)
        if grad_lse is not None:
            dq_lse, dk_lse = _backward_of_lse(p, kernel, grad_lse, q, k, v, lse)
            dq, dk = dq + dq_lse, dk + dk_lse
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        if p.n_slots == 0:
            return dq, dk, dv, None
    assert depth_k is not None and depth_v is not None
    pending, index, first_slot = (None, 0, 0) if deferred is None else deferred
    dq_depth = depth_backward(
        grad_out, q if q_depth is None else _rows(q_depth), depth_k, depth_v, out, lse, p.scale,
        grad_depth_k=grad_depth_k, grad_depth_v=grad_depth_v, fresh=fresh, grad_lse=grad_lse,
        add_to=dq if q_depth is None else None, pending=pending, index=index, first_slot=first_slot,
    )  # fmt: skip
    if q_depth is None:
        return dq_depth, dk, dv, None
    return (torch.zeros_like(q) if dq is None else dq), dk, dv, dq_depth


def _backward_of_lse(
    p: Problem,
    kernel: sequence.SequenceKernel,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradient of the LSE adds to dq and dk, from a kernel that knows gradients of the output only.

    A backward computes ds = p * (do . v - do . out). With v = 0, ``out`` = minus the LSE's gradient (as three parts of half
    precision that add up to it) and ``do`` = 1 in those three places, ds = p * grad_lse.
    """
    low = grad_lse.float().transpose(1, 2)
    do = torch.zeros_like(q, memory_format=torch.contiguous_format)
    fake_out = torch.zeros_like(do)
    do[..., :3] = 1
    for i in range(3):
        part = low.to(q.dtype)
        fake_out[..., i] = -part
        low = low - part.float()
    dq, dk, _ = kernel.backward(p, do, q, k, torch.zeros_like(v), fake_out, lse)
    return dq, dk
