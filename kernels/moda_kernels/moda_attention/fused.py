"""The fused backend: sequence and depth in one Triton forward kernel, three kernels for the backward.

See :mod:`.fused_forward` (the paper's algorithm 1) and :mod:`.fused_backward`.
"""

from __future__ import annotations

import os

import torch

from . import fused_backward, fused_forward
from .problem import Problem

__all__ = ["backward", "forward", "name", "unsupported"]

name = "fused"

MAX_HEAD_DIM = 128
MAX_GROUP = 32


def unsupported(p: Problem) -> str | None:
    """Why the fused kernels cannot solve ``p``, naming the argument, or None if they can."""
    if p.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"q: dtype must be bfloat16 or float16, got {p.dtype}"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if p.device.type != "cuda" and not interpreted:
        return f"q: a CUDA device is needed (or TRITON_INTERPRET=1 for small tests on a CPU), got {p.device}"
    if p.device.type == "cuda" and p.dtype == torch.float32:
        return (
            "q: dtype must be bfloat16 or float16, got torch.float32 (matrix units multiply it as tf32 only, 10 bits)"
        )
    if p.device.type != "cuda" and p.dtype == torch.bfloat16:
        return "q: dtype bfloat16 needs a GPU, Triton's interpreter rounds its products wrongly"
    if p.device.type == "cuda" and p.dtype == torch.bfloat16 and torch.cuda.get_device_capability(p.device)[0] < 8:
        return "q: bfloat16 needs compute capability 8.0 or higher"
    if p.head_dim % 8 or p.head_dim > MAX_HEAD_DIM:
        return f"q: head dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {p.head_dim}"
    if p.group > MAX_GROUP:
        return f"q: at most {MAX_GROUP} query heads to a key/value head, got {p.group}"
    return None


def _rows(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors with a contiguous last dimension: strided ones as they are, others copied."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, T, Hq, D]`` in q's dtype and natural-log LSE ``[B, Hq, T]`` in fp32."""
    if p.n_slots == 0:
        depth_k = depth_v = q_depth = None
    q_, k, v, depth_k, depth_v, q_depth = _rows(q, k, v, depth_k, depth_v, q_depth)
    assert q_ is not None
    return fused_forward.forward(p, q_, k, v, depth_k, depth_v, q_depth)


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dq, dk, dv and the gradient of ``q_depth``; depth gradients are stored (``fresh`` slots) or added in place."""
    if p.n_slots == 0:
        depth_k = depth_v = q_depth = grad_depth_k = grad_depth_v = None
    for what, grad in (("grad_depth_k", grad_depth_k), ("grad_depth_v", grad_depth_v)):
        if grad is not None and grad.stride(-1) != 1:
            raise ValueError(
                f"fused backward: {what} must have a contiguous last dimension, got strides {grad.stride()}"
            )
    if grad_lse is not None:
        grad_lse = grad_lse.float().contiguous()
    do, q_, k, v, depth_k, depth_v, q_depth, o = _rows(grad_out, q, k, v, depth_k, depth_v, q_depth, out)
    assert do is not None and q_ is not None and o is not None
    return fused_backward.backward(
        p, do, grad_lse, q_, k, v, depth_k, depth_v, q_depth, o, lse.contiguous(), grad_depth_k, grad_depth_v, fresh
    )
