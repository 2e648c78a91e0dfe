"""What a sequence kernel of the ``split`` backend is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import Kind, Problem

Gradients = tuple[Tensor, Tensor, Tensor]

HALF = (torch.float16, torch.bfloat16)


class SequenceKernel:
    """One flash attention. Tensors are ``[B, T, H, D]`` with the last dimension contiguous; LSE is ``[B, Hq, T]`` fp32."""

    name: str
    #: Its rank on devices of compute capability below 9, and from 9.
    ranks: tuple[int, int]

    def missing(self, device: torch.device) -> str | None:
        """Why this machine does not have the kernel, or None. Unless overridden it needs compute capability 8.0."""
        if device.type != "cuda":
            return f"device {device.type}: {self.name} needs CUDA"
        return f"{self.name} needs compute capability 8.0" if torch.cuda.get_device_capability(device)[0] < 8 else None

    def unsupported(self, kind: Kind) -> str | None:
        """Why the kernel cannot solve problems of this kind, naming the argument, or None."""
        if kind.dtype not in HALF:
            return f"dtype {kind.dtype}: {self.name} takes float16 and bfloat16"
        if kind.head_dim % 8 or kind.head_dim > 128:
            return f"head dim {kind.head_dim}: {self.name} takes multiples of 8 up to 128"
        return None

    def rank(self, capability: tuple[int, int]) -> int:
        """Order of preference on a device of this capability: the lowest that can run is taken."""
        return self.ranks[capability[0] >= 9]

    def describe(self) -> str:
        """Its name, and the package and version that it comes from where that is not PyTorch or this one."""
        return self.name

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        raise NotImplementedError


def packed(p: Problem, *tensors: Tensor) -> list[Tensor]:
    """``[B, T, H, D]`` as they are, or ``[T, H, D]`` for packed documents."""
    return list(tensors) if p.cu_seqlens is None else [x[0] for x in tensors]


def unpacked(p: Problem, *tensors: Tensor) -> Any:
    return tensors if p.cu_seqlens is None else tuple(x.unsqueeze(0) for x in tensors)
