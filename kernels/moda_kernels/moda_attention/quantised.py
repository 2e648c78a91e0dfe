"""Depth slots in fp8: one number of e4m3 (4 exponent bits, 3 of the mantissa) per element, one fp32 scale per row.

A *row* is the D numbers of one slot, batch row, token and key/value head:

    scale = max |x| / 448        code = x / scale, rounded to the nearest e4m3        x ~ scale * code

448 is the largest e4m3. Rows are small, so that one head's or token's outlier costs no other its precision: the relative error
of an element is at most 2^-4 down to a 28,000th (448 * 2^6) of its row's largest, and below that it is absolute. Scales are fp32
because Triton's pipelines load no less than 4 bytes, and the scales of a token's eight heads are then one 32-byte sector;
they add 4 bytes to D.

Backends compute with ``scale * code``, rounded once to fp32 or not at all. Gradients are those of that value, and are handed
as they are to what was written (straight-through): rounding has a derivative of zero almost everywhere, taken as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import Inputs

CODES = torch.float8_e4m3fn
LARGEST = 448.0
#: The least scale: the smallest normal fp32, so that a row of zeros divides by something.
LEAST = torch.finfo(torch.float32).tiny


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``x [..., D]`` and fp32 scales ``[...]``. A number that is not finite becomes NaN."""
    x = x.float()
    scale = (x.abs().amax(-1) / LARGEST).clamp_(min=LEAST)
    return (x / scale[..., None]).to(CODES), scale


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * code`` ``[..., D]``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * scale[..., None].to(wide)).to(dtype)


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
    """:func:`quantise` in place; on a GPU one kernel for both, which gives the same bits."""
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
