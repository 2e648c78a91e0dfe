"""Slots in fp8 (:mod:`.fp8`) as the operator and the stream have them: who can read them, and how they are written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .fp8 import dequantise, quantise
from .tensors import Inputs


def dequantised(x: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with depth slots in ``dtype``, if they are in fp8."""
    if x.depth_k is None or x.depth_v is None or x.scale_k is None or x.scale_v is None:
        return x
    slots = dequantise(x.depth_k, x.scale_k, dtype), dequantise(x.depth_v, x.scale_v, dtype)
    return x._replace(depth_k=slots[0], depth_v=slots[1], scale_k=None, scale_v=None)


class Quantised(NamedTuple):
    """Where a pair of keys and values ``[B, T, Hk, D]`` goes: contiguous codes of that shape and scales ``[B, T, Hk]``."""

    k: Tensor
    v: Tensor
    scale_k: Tensor
    scale_v: Tensor


@functools.cache
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor, Quantised], None] | None:
    if device.type != "cuda" or fp8_missing(device) is not None or find_spec("triton") is None:
        return None
    from .quantise_kernel import quantise_pair

    return quantise_pair


def quantise_to(k: Tensor, v: Tensor, to: Quantised) -> None:
    """:func:`.fp8.quantise` in place; on a GPU one kernel for both, which gives the same bits."""
    if (kernel := _kernel(k.device)) is not None:
        kernel(k, v, to)
        return
    for x, codes, scales in ((k, to.k, to.scale_k), (v, to.v, to.scale_v)):
        new, scale = quantise(x)
        codes.copy_(new)
        scales.copy_(scale)


def fp8_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot read e4m3 on a device, or None if they can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        return f"e4m3 needs compute capability 8.9 or higher, this GPU has {major}.{minor}"
    return None
