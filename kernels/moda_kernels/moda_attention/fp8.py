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

import torch
from torch import Tensor

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


def rounded(x: Tensor) -> Tensor:
    """What is left of ``x`` after both, in its dtype."""
    return dequantise(*quantise(x), x.dtype)
