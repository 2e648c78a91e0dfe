"""Slots that leave one stream and enter another: a model in stages, each of which has a stream of its own.

A stage's stream has the layout :meth:`.layout.DepthLayout.part`. Slots that the stage receives are written first, as if their
layers had run, and stay there for all of its readers. What later stages need, received or written, leaves as one tensor. In the
backward pass its gradient, which sums over all readers of later stages, is deposited in the stream before the stage's own readers
add to it; so what is taken of a received slot and sent back is the sum over all readers from this stage on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import depth_write
from .stream import DepthStream, stream_of

__all__ = ["receive_slots", "send_slots"]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Tensor, row: Tensor) -> Tensor:
        stream, layer = stream_of(row)
        ctx.save_for_backward(order, row)
        return stream.copy(layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        order, row = ctx.saved_tensors
        stream, layer = stream_of(row)
        stream.deposit(layer, grad)
        return torch.empty_like(order), None


def send_slots(order: Tensor, stream: DepthStream) -> Tensor | None:
    """A copy ``[2 S, B, T, Hk, D]`` of the slots that later stages need, all keys before all values; None if there are none."""
    last = stream.layout.n_layers - 1
    return _Copy.apply(order, stream.layer_rows[last]) if stream.layout.read_slots(last) else None


def receive_slots(order: Tensor, slots: Tensor, stream: DepthStream, first: int) -> Tensor:
    """Write what :func:`send_slots` gave into the stream of the stage that begins with layer ``first``; the next ``order``."""
    parts = slots.unbind()
    half = len(parts) // 2
    for candidate, k, v in zip(stream.layout.crossing(first), parts[:half], parts[half:], strict=True):
        layer, kind = divmod(candidate, stream.layout.kinds)
        order = depth_write(order, k, v, stream.layer_rows[layer], kind)
    return order
