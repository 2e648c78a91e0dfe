"""The fused backend: sequence and depth in one Triton forward kernel, three kernels for the backward.

See :mod:`.forward` (the paper's algorithm 1) and :mod:`.backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend
from ..problem import Kind, Problem
from ..steps import rows
from ..tensors import DepthGradients, DepthTarget, Gradients, Inputs, Result
from . import backward, forward

MAX_HEAD_DIM = 128
MAX_GROUP = 32


def _all_rows(x: Inputs) -> Inputs:
    return Inputs(*(None if tensor is None else rows(tensor) for tensor in x))  # type: ignore[arg-type]


class Fused(Backend):
    name = "fused"

    def unsupported(self, kind: Kind) -> str | None:
        if kind.selects:
            return "depth_top: only the reference backend picks a token's slots by their logits"
        if kind.biased:
            return "depth_bias: fused adds none, split and reference do"
        if kind.quantised:
            return "depth_k: fused does not read fp8, split and reference do"
        cuda = kind.device.type == "cuda"
        if kind.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"q: dtype must be bfloat16 or float16, got {kind.dtype}"
        if not cuda and not kind.interpreted:
            return f"q: a CUDA device is needed (or TRITON_INTERPRET=1 for small tests on a CPU), got {kind.device}"
        if cuda and kind.dtype == torch.float32:
            return "q: dtype must be bfloat16 or float16, got torch.float32 (matrix units multiply it as tf32 only, 10 bits)"
        if not cuda and kind.dtype == torch.bfloat16:
            return "q: dtype bfloat16 needs a GPU, Triton's interpreter rounds its products wrongly"
        if cuda and kind.dtype == torch.bfloat16 and torch.cuda.get_device_capability(kind.device)[0] < 8:
            return "q: bfloat16 needs compute capability 8.0 or higher"
        if kind.head_dim % 8 or kind.head_dim > MAX_HEAD_DIM:
            return f"q: head dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {kind.head_dim}"
        if kind.group > MAX_GROUP:
            return f"q: at most {MAX_GROUP} query heads to a key/value head, got {kind.group}"
        return None

    def forward(self, p: Problem, x: Inputs) -> Result:
        return forward.forward(p, _all_rows(x))

    def backward(
        self, p: Problem, grad_out: Tensor, grad_lse: Tensor | None, x: Inputs, saved: Result, depth: DepthTarget
    ) -> Gradients:
        if depth is not None:
            assert isinstance(depth, DepthGradients)
            for name, grad in (("grad_depth_k", depth.k), ("grad_depth_v", depth.v)):
                if grad.stride(-1) != 1:
                    raise ValueError(
                        f"fused backward: {name} must have a contiguous last dimension, got strides {grad.stride()}"
                    )
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        saved = Result(rows(saved.out), saved.lse.contiguous())
        return backward.backward(p, rows(grad_out), grad_lse, _all_rows(x), saved, depth)


backend = Fused()
