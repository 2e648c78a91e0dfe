"""The sequence branch of the ``split`` backend: every flash attention it can be plugged into, in one place.

A sequence kernel computes ordinary attention of ``q [B, T, Hq, D]`` over ``k, v [B, T, Hk, D]`` with native GQA and returns the
natural-log LSE. Its backward is given the output and the LSE *merged* with the depth branch: flash attention's backward
recomputes p = exp(x - lse) and needs delta = do . out, so with the merged pair it yields the sequence part of the joint
softmax exactly (the same merge as in torch's ring attention).

The best one present is chosen by capability; ``MODA_SEQUENCE_KERNEL`` forces one by name, and a forced one runs or raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..fused import backend as fused
from ..problem import Kind, Problem
from ..tensors import Inputs, Result
from .flash_attention_4 import FlashAttention4
from .kernel import Gradients, SequenceKernel, packed, unpacked

log = logging.getLogger(__name__)


@functools.cache
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """Random state that the aten backward operators ask for and, without dropout, do not look at."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.int64, device=device)


class CudnnAttention(SequenceKernel):
    """cuDNN's fused attention through aten."""

    name = "cudnn"
    ranks = (3, 1)

    def missing(self, device: torch.device) -> str | None:
        reason = super().missing(device)
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if reason is None and (version is None or version < 90000):
            reason = f"{self.name} needs cuDNN 9 or later, got {version}"
        return reason

    def unsupported(self, kind: Kind) -> str | None:
        if kind.packed:
            return f"cu_seqlens: {self.name} is used without packed documents"
        if kind.one_token:
            return f"T = 1: {self.name} needs at least two keys"
        return super().unsupported(kind)

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, p.causal, False, scale=p.scale
        )
        return out.transpose(1, 2), lse.view(lse.shape[:3])

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        _, scalar = _no_dropout(q.device)
        if do.stride() != out.stride():  # cuDNN reads both with one set of strides
            do, out = do.contiguous(), out.contiguous()
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            do.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2),
            lse.unsqueeze(-1), scalar, scalar, None, None, None, p.length, p.length, 0.0, p.causal, scale=p.scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class AtenFlash(SequenceKernel):
    """FlashAttention 2 as built into PyTorch; packed documents too."""

    name = "flash"
    ranks = (4, 5)

    def missing(self, device: torch.device) -> str | None:
        if not torch.backends.cuda.is_flash_attention_available():
            return f"this PyTorch was built without {self.name} attention"
        return super().missing(device)

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = packed(p, q, k, v)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, p.cu_seqlens, p.cu_seqlens, p.max_seqlen, p.max_seqlen, 0.0, p.causal, False, scale=p.scale
        )
        return unpacked(p, out, lse)

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        rng, scalar = _no_dropout(q.device)
        do, q, k, v, out, lse = packed(p, do, q, k, v, out, lse)
        grads = torch.ops.aten._flash_attention_backward(
            do, q, k, v, out, lse, p.cu_seqlens, p.cu_seqlens, p.max_seqlen, p.max_seqlen, 0.0, p.causal, rng,
            scalar, scale=p.scale,
        )  # fmt: skip
        return unpacked(p, *grads)


class FlashAttnPackage(SequenceKernel):
    """The flash-attn packages: FlashAttention 3 (``flash_attn_interface``) or 2 (``flash_attn``), imported when first used."""

    def __init__(self, name: str, module: str, major: int) -> None:
        self.name, self.module, self.major = name, module, major
        self.ranks = (1, 2) if major == 3 else (2, 3)

    def missing(self, device: torch.device) -> str | None:
        reason, package = super().missing(device), self.module.partition(".")[0]
        if reason is None and self.major == 3 and torch.cuda.get_device_capability(device)[0] != 9:
            reason = f"{self.name} needs compute capability 9.x"
        if reason is None:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:  # a folder of that name, without a module, is FlashAttention 4's
                reason = f"{self.name}: the package {package} is not installed"
        return reason

    def _call(self, p: Problem, name: str, *tensors: Tensor, **options: Any) -> Any:
        """FlashAttention 2's function of this name, or its twin for packed documents."""
        packing = () if p.cu_seqlens is None else (p.cu_seqlens, p.cu_seqlens, p.max_seqlen, p.max_seqlen)
        function = f"_flash_attn_{name}" if p.cu_seqlens is None else f"_flash_attn_varlen_{name}"
        return getattr(importlib.import_module(self.module), function)(
            *tensors, *packing, dropout_p=0.0, softmax_scale=p.scale, causal=p.causal, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, **options,
        )  # fmt: skip

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = packed(p, q, k, v)
        if self.major == 3:
            cu, longest = p.cu_seqlens, None if p.cu_seqlens is None else p.max_seqlen
            out, lse, *_ = importlib.import_module(self.module)._flash_attn_forward(
                q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest,
                softmax_scale=p.scale, causal=p.causal,
            )  # fmt: skip
        else:
            out, lse, *_ = self._call(p, "forward", q, k, v, return_softmax=False)
        return unpacked(p, out, lse)

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        do, q, k, v, out, lse = packed(p, do, q, k, v, out, lse)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        if self.major == 3:
            cu, longest = p.cu_seqlens, p.max_seqlen
            packing = (None,) * 6 if cu is None else (cu, cu, None, None, longest, longest)
            backward = importlib.import_module(self.module)._flash_attn_backward
            backward(do, q, k, v, out, lse, *packing, *grads, p.scale, p.causal)
        else:
            self._call(p, "backward", do, q, k, v, out, lse, *grads, deterministic=False)
        return unpacked(p, *grads)


class TritonAttention(SequenceKernel):
    """This project's own fused kernels without depth slots; packed documents too."""

    name = "triton"
    ranks = (5, 4)  # ahead of FlashAttention 2 where it was measured: kernels/results

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"device {device.type}: {self.name} needs CUDA"

    def unsupported(self, kind: Kind) -> str | None:
        return super().unsupported(kind) or fused.unsupported(kind)

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fused.forward(replace(p, n_slots=0, slots=None), Inputs(q, k, v))

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        p = replace(p, n_slots=0, slots=None)
        dq, dk, dv, *_ = fused.backward(p, do, None, Inputs(q, k, v), Result(out, lse), None)
        assert dk is not None and dv is not None
        return dq, dk, dv


class CpuFlash(SequenceKernel):
    """PyTorch's flash attention for CPUs in fp64, so that ``split`` runs where Triton's interpreter stands in for a GPU."""

    name = "cpu"
    ranks = (6, 6)

    def missing(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"device {device.type}: {self.name} needs a CPU"

    def unsupported(self, kind: Kind) -> str | None:
        return f"cu_seqlens: {self.name} does not pack documents" if kind.packed else None

    @staticmethod
    def _heads_first(p: Problem, *tensors: Tensor) -> list[Tensor]:
        """``[B, Hq, T, D]`` in fp64, key/value heads repeated."""
        return [x.double().repeat_interleave(p.n_heads // x.shape[2], dim=2).transpose(1, 2) for x in tensors]

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._heads_first(p, q, k, v), 0.0, p.causal, scale=p.scale
        )
        return out.transpose(1, 2).to(p.dtype).contiguous(), lse.float().contiguous()

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        tensors = self._heads_first(p, do, q, k, v, out)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse.double(), 0.0, p.causal, scale=p.scale
        )
        dk, dv = (x.transpose(1, 2).unflatten(2, (p.n_kv_heads, p.group)).sum(3).to(p.dtype) for x in (dk, dv))
        return dq.transpose(1, 2).to(p.dtype).contiguous(), dk, dv


_KERNELS: dict[str, SequenceKernel] = {kernel.name: kernel for kernel in (
    FlashAttention4(), CudnnAttention(), FlashAttnPackage("flash_attn_3", "flash_attn_interface", 3),
    FlashAttnPackage("flash_attn_2", "flash_attn.flash_attn_interface", 2), TritonAttention(), AtenFlash(), CpuFlash(),
)}  # fmt: skip


@functools.cache
def _present(device: torch.device) -> tuple[tuple[SequenceKernel, ...], dict[str, str]]:
    """The kernels that a device has, best first, and why it does not have the others."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    reasons = {k.name: reason for k in _KERNELS.values() if (reason := k.missing(device)) is not None}
    present = [k for k in _KERNELS.values() if k.name not in reasons]
    return tuple(sorted(present, key=lambda k: k.rank(capability))), reasons


def select(kind: Kind) -> tuple[SequenceKernel | None, str | None]:
    """The kernel for problems of this kind (the forced one, or the best present that can solve them), or None and why.

    :raises ValueError: for a forced name that does not exist.
    """
    name = kind.sequence_kernel
    present, reasons = _present(kind.device)
    if name is not None:
        if name not in _KERNELS:
            raise ValueError(f"moda_attention: MODA_SEQUENCE_KERNEL must be one of {', '.join(_KERNELS)}, got {name!r}")
        reason = reasons.get(name) or _KERNELS[name].unsupported(kind)
        return (None, f"sequence kernel {name!r} was asked for: {reason}") if reason else (_KERNELS[name], None)
    refused = []
    for kernel in present:
        if (reason := kernel.unsupported(kind)) is None:
            return kernel, None
        refused.append(reason)
    return None, "no sequence kernel: " + "; ".join(refused or reasons.values())


def choose(kind: Kind) -> SequenceKernel:
    """The kernel of :func:`select`, or ValueError that says why there is none."""
    kernel, reason = select(kind)
    if kernel is None:
        raise ValueError(f"moda_attention: backend 'split' cannot run this: {reason}")
    _say(kind.device, kernel)
    return kernel


@functools.cache
def _say(device: torch.device, kernel: SequenceKernel) -> None:
    log.info("moda_attention: backend split runs sequence kernel %s on %s", kernel.describe(), device)
