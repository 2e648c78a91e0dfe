"""The split backend: the device's best flash attention for the sequence, a memory-bound Triton kernel for depth.

The two are merged exactly by log-sum-exp: the depth kernel's online softmax starts from the sequence branch's output and LSE,
and the sequence kernel's own backward is given the merged pair (:mod:`.sequence`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend
from ..problem import Kind, Problem
from ..quantised import fp8_missing
from ..steps import rows
from ..tensors import DepthTarget, Gradients, Inputs, Result
from . import sequence
from .depth_backward import depth_backward
from .depth_forward import depth_forward
from .flush import MAX_PRODUCTS, LayerProducts

HEAD_DIMS = range(8, 129, 8)


class Split(Backend):
    name = "split"
    defers = True

    def unsupported(self, kind: Kind) -> str | None:
        if kind.selects:
            return "depth_top: only the reference backend picks a token's slots by their logits"
        if kind.device.type != "cuda" and not (kind.device.type == "cpu" and kind.interpreted):
            return f"device {kind.device.type}: split needs a CUDA device"
        if kind.quantised and (reason := fp8_missing(kind.device)) is not None:
            return f"depth_k: {reason}"
        if kind.depth_chunk != 1:
            return f"depth_chunk {kind.depth_chunk}: split's depth kernels see a token's own slots only"
        if kind.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"dtype {kind.dtype}: split takes float16 and bfloat16, and float32 without a sequence branch"
        if kind.head_dim not in HEAD_DIMS:
            return f"head dim {kind.head_dim}: split takes multiples of 8 up to 128"
        return sequence.select(kind)[1] if kind.has_sequence else None

    def forward(self, p: Problem, x: Inputs) -> Result:
        """Bitwise reproducible."""
        branch = None
        if x.k is not None and x.v is not None:
            out, lse = sequence.choose(p.kind).forward(p, rows(x.q), rows(x.k), rows(x.v))
            if p.n_slots == 0:
                return Result(out.contiguous(), lse.contiguous())
            branch = Result(out, lse.contiguous())
        return _read_depth(p, x, branch)

    def add_depth(self, p: Problem, x: Inputs, sequence: Result) -> Tensor:
        """Merged as the slots are read; ``sequence.out`` may be overwritten."""
        return _read_depth(p, x, Result(sequence.out, sequence.lse.contiguous())).out

    def backward(
        self, p: Problem, grad_out: Tensor, grad_lse: Tensor | None, x: Inputs, saved: Result, depth: DepthTarget
    ) -> Gradients:
        """The depth part is bitwise reproducible; cuDNN and flash attention add up the sequence's dq in no fixed order."""
        q, grad_out = rows(x.q), rows(grad_out)
        dq = dk = dv = None
        if x.k is not None and x.v is not None:
            k, v = rows(x.k), rows(x.v)
            kernel = sequence.choose(p.kind)
            dq, dk, dv = kernel.backward(p, grad_out, q, k, v, *saved)
            if grad_lse is not None:
                dq_lse, dk_lse = _backward_of_lse(p, kernel, grad_lse, q, k, v, saved.lse)
                dq, dk = dq + dq_lse, dk + dk_lse
            dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
            if p.n_slots == 0:
                return Gradients(dq, dk, dv, None)
        assert x.depth_k is not None and x.depth_v is not None and depth is not None
        dbias = None if x.depth_bias is None else torch.empty_like(x.depth_bias)
        dq_depth = depth_backward(
            grad_out, rows(x.depth_query), x.depth_k, x.depth_v, saved, p.scale, depth,
            slot_scales=(x.scale_k, x.scale_v), bias=x.depth_bias, grad_bias=dbias, table=p.table, grad_lse=grad_lse,
            add_to=dq if x.q_depth is None else None,
        )  # fmt: skip
        if x.q_depth is None:
            return Gradients(dq_depth, dk, dv, None, dbias)
        return Gradients(torch.zeros_like(q) if dq is None else dq, dk, dv, dq_depth, dbias)

    def pending(self, layers: int, slots: int, q: Tensor, n_kv_heads: int) -> LayerProducts:
        return LayerProducts(max(1, min(layers, MAX_PRODUCTS * n_kv_heads // q.shape[2])), slots, q)


def _read_depth(p: Problem, x: Inputs, branch: Result | None) -> Result:
    assert x.depth_k is not None and x.depth_v is not None
    return depth_forward(
        rows(x.depth_query), x.depth_k, x.depth_v, p.scale, slot_scales=(x.scale_k, x.scale_v), bias=x.depth_bias,
        table=p.table, sequence=branch,
    )  # fmt: skip


def _backward_of_lse(
    p: Problem, kernel: sequence.SequenceKernel, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
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


backend = Split()
