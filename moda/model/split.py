"""Tensor parallelism of blocks with a depth mechanism: what a rank computes with local tensors, and where ranks meet.

Between sublayers each rank holds some tokens whole, as in OLMo-core's blocks (sequence parallelism). Within a sublayer it holds
all tokens and some heads: the input is gathered, its gradient is a sum over the ranks, and every parameter comes as the rank's
part. A parameter that all ranks share there, such as a per-head norm's gain, has a gradient that is such a sum too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor

from moda.depth.mechanism import local

__all__ = ["distribute", "rms_norm", "whole"]


def distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Split or replicate a module's own parameters over the ranks of ``mesh``."""
    for name, p in module.named_parameters(recurse=False):
        part = nn.Parameter(distribute_tensor(p.detach(), mesh, [placement]), requires_grad=p.requires_grad)
        module.register_parameter(name, part)


def whole(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of a stream ``[B, T, d]`` split by tokens: as a distributed and as a local tensor."""
    assert isinstance(x, DTensor)
    gathered = x.redistribute(placements=[Replicate()])
    return gathered, gathered.to_local(grad_placements=[Partial()])


def rms_norm(x: torch.Tensor, norm: Any, mesh: DeviceMesh | None) -> torch.Tensor:
    """An RMSNorm without bias over the last dimension, in fp32 or above.

    :param norm: has ``eps``, and ``weight`` if it has a gain.
    :param mesh: the ranks that hold the parts of the last dimension, or None where it is whole.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares, width = wide.square().sum(-1, keepdim=True), x.shape[-1]
    if mesh is not None:
        width *= mesh.size()
        total = DTensor.from_local(squares, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        squares = total.to_local(grad_placements=[Partial()])
    wide = wide * torch.rsqrt(squares / width + norm.eps)
    gain = getattr(norm, "weight", None)
    return (wide if gain is None else local(gain).to(wide.dtype) * wide).to(x.dtype)
