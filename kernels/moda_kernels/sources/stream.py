"""The source stream: what the layers of one forward pass leave for sums over depth, and in the backward pass its gradients.

    sources = Sources(n, choose)                  one per forward pass, never per module
    sources.write(x)                              [B, T, d]: the next source
    q, k, v = sources.mix(weights)                sums of the sources so far, as many as the weights have
    (y,), (lse,) = sources.attend(queries, eps)   sums under a softmax over the sources so far

A stream owns a buffer ``[n, B, T, d]`` and, once a backward pass has begun, one of the same shape for gradients. A source is
copied into the buffer once and read there by all later layers, without stacking. Gradients get home without one tensor per
source and reader: a read's backward pass stores into the gradient buffer, or adds to it, in place; a write's takes its source's
out. Every write and read hands on a tensor without elements, so that autograd goes through them in reverse order, whatever else
it does; its last node lets go of the buffers: a loss that is kept keeps no memory. Streams are for what is between blocks:
within, activation checkpointing would write and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..order import begin


class Target(NamedTuple):
    """Gradients ``[n, B, T, d]`` of the sources read, which a backward pass adds to.

    :param new: the first and the end of those that have no value yet: they are stored.
    """

    grad: Tensor
    new: tuple[int, int]


class Sums(Protocol):
    """Sums over sources ``x [n, B, T, d]``, c of them at once, and their gradients."""

    def mix(self, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """c contiguous sums ``[B, T, d]`` with weights ``[B, T, c, n]``, or ``[c, n]`` for all tokens."""
        ...

    def mix_backward(self, x: Tensor, weights: Tensor, grads: Sequence[Tensor], to: Target) -> Tensor:
        """The gradient of the weights; those of the sources join ``to``."""
        ...

    def attend(self, x: Tensor, queries: Tensor, eps: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """c contiguous sums ``[B, T, d]`` with weights softmax(query . RMSNorm(x)) over n, and the logits' natural-log LSE.

        :param queries: ``[c, d]``, fp32 or above, which is also the dtype of the LSE ``[c, B, T]``. RMSNorm has no gain.
        """
        ...

    def attend_backward(
        self, x: Tensor, queries: Tensor, eps: float, out: Sequence[Tensor], lse: Tensor, grads: Sequence[Tensor],
        grad_lse: Tensor, to: Target,
    ) -> Tensor:  # fmt: skip
        """The gradient of the queries; those of the sources join ``to``."""
        ...


class SourceStream:
    """The sources of one forward pass. The buffer is allocated at the first write, in its shape, dtype and device.

    :param n: how many sources there will be.
    :param choose: what computes sums, for sources like the first.
    """

    def __init__(self, n: int, choose: Callable[[Tensor], Sums]) -> None:
        self.n, self.choose = n, choose
        self.written = 0
        self._reads = 0
        self._differentiated: set[int] = set()
        self._buffer: Tensor | None = None
        self._grad: Tensor | None = None
        self._has_gradient: set[int] = set()

    def write(self, x: Tensor) -> int:
        """Copy the next source ``[B, T, d]``; its number."""
        if self._buffer is None:
            self._buffer = x.new_empty(self.n, *x.shape)
            self.sums = self.choose(x)
        if self.written == self.n:
            raise RuntimeError(f"source stream: more than the {self.n} sources that there should be")
        self._buffer[self.written].copy_(x)
        self.written += 1
        return self.written - 1

    def read(self, rows: range) -> Tensor:
        """Sources ``[n, B, T, d]``."""
        if self._buffer is None or not rows or rows[-1] >= self.written:
            raise RuntimeError(f"source stream: expected some of {self.written} sources, got {rows}")
        return self._buffer[rows.start : rows[-1] + 1 : rows.step]

    def begin_read(self) -> int:
        """A number for a read."""
        self._reads += 1
        return self._reads

    def begin_backward(self, number: int) -> None:
        """Note that a read is being differentiated, which may happen once."""
        if self._buffer is None or number in self._differentiated:
            raise RuntimeError(
                "source stream: the backward pass ran twice over one forward pass; "
                "run the forward pass again instead of keeping its graph (retain_graph)"
            )
        self._differentiated.add(number)

    def gradients(self, rows: range) -> Target:
        """Where a read's backward pass leaves the gradients of its sources."""
        assert self._buffer is not None
        if self._grad is None:
            self._grad = torch.empty_like(self._buffer)
        new = [i for i, row in enumerate(rows) if row not in self._has_gradient]
        first, end = (new[0], new[-1] + 1) if new else (0, 0)
        if len(new) < end - first:  # some between them have a gradient
            for i in new:
                self._grad[rows[i]].zero_()
            first = end = 0
        self._has_gradient.update(rows)
        return Target(self._grad[rows.start : rows[-1] + 1 : rows.step], (first, end))

    def take_gradient(self, row: int) -> Tensor | None:
        """The gradient of a source, handed over; None if nothing that was differentiated has read it."""
        if self._grad is None or row not in self._has_gradient:
            return None
        self._has_gradient.remove(row)
        return self._grad[row]

    def end_backward(self) -> None:
        """Let go of the buffers."""
        self._buffer = self._grad = None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Tensor, x: Tensor, stream: SourceStream) -> Tensor:
        ctx.stream, ctx.row, ctx.to = stream, stream.write(x), (x.device, x.dtype)
        return torch.empty_like(order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_order: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.stream.take_gradient(ctx.row)
        return grad_order, None if grad is None else grad.to(*ctx.to), None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, order: Tensor, weights: Tensor, stream: SourceStream, rows: range) -> tuple[Tensor, ...]:
        x = stream.read(rows)
        ctx.stream, ctx.rows, ctx.number = stream, rows, stream.begin_read()
        ctx.save_for_backward(weights)
        return torch.empty_like(order), *stream.sums.mix(x, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_order: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stream, rows = ctx.stream, ctx.rows
        stream.begin_backward(ctx.number)
        grad = stream.sums.mix_backward(stream.read(rows), *ctx.saved_tensors, grads, stream.gradients(rows))
        return grad_order, grad, None, None


class _Attend(torch.autograd.Function):
    """No result is a view: compiled blocks would depend on what it is a view of."""

    @staticmethod
    def forward(
        ctx: Any, order: Tensor, queries: Tensor, eps: float, stream: SourceStream, rows: range
    ) -> tuple[Tensor, ...]:
        x = stream.read(rows)
        ctx.stream, ctx.rows, ctx.number, ctx.eps = stream, rows, stream.begin_read(), eps
        out, lse = stream.sums.attend(x, queries, eps)
        ctx.save_for_backward(queries, lse, *out)
        return torch.empty_like(order), *(part.clone() for part in lse), *out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_order: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stream, rows, (queries, lse, *out) = ctx.stream, ctx.rows, ctx.saved_tensors
        stream.begin_backward(ctx.number)
        of_lse, of_out = torch.stack(grads[: len(out)]), grads[len(out) :]
        grad = stream.sums.attend_backward(
            stream.read(rows), queries, ctx.eps, out, lse, of_out, of_lse, stream.gradients(rows)
        )
        return grad_order, grad, None, None, None


class Sources:
    """One forward pass's way to a source stream, and autograd's order in it. Arguments are those of :class:`SourceStream`.

    Sources may come from several devices: they are copied to that of the first, and sums to that of the last.
    """

    def __init__(self, n: int, choose: Callable[[Tensor], Sums], device: torch.device | None = None) -> None:
        self._stream = SourceStream(n, choose)
        self._order = begin(self._stream, device)
        self._first = self._last = self._order.device

    def __len__(self) -> int:
        """How many sources are written."""
        return self._stream.written

    def write(self, x: Tensor) -> None:
        """Write the next source, ``[B, T, d]``.

        :raises RuntimeError: for more sources than there should be.
        """
        self._order = _Write.apply(self._order, x, self._stream)
        self._first, self._last = x.device if len(self) == 1 else self._first, x.device

    def mix(self, weights: Tensor, rows: range | None = None) -> tuple[Tensor, ...]:
        """Weighted sums of sources, which are read once for all of them.

        :param weights: ``[B, T, c, n]``, or ``[c, n]`` for all tokens; c is 1, 2 or 4 (on a CPU any).
        :param rows: which n sources; None for all that are written.

        :returns: c sums ``[B, T, d]``.

        :raises RuntimeError: for a source that is not written.
        """
        rows = range(len(self)) if rows is None else rows
        self._order, *out = _Mix.apply(self._order, weights.to(self._first), self._stream, rows)
        return tuple(x.to(self._last) for x in out)

    def attend(self, queries: Tensor, eps: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Sums of all sources with weights softmax(query . RMSNorm(source)) over the sources.

        :param queries: ``[c, d]``, fp32 (fp64 for such sources); c is 1, 2 or 4 (on a CPU any).
        :param eps: the norm's.

        :returns: c sums ``[B, T, d]``, and c natural-log LSEs ``[B, T]`` in the queries' dtype.

        :raises RuntimeError: without a source.
        """
        queries, rows = queries.to(self._first), range(len(self))
        self._order, *parts = _Attend.apply(self._order, queries, eps, self._stream, rows)
        parts = [x.to(self._last) for x in parts]
        return tuple(parts[len(queries) :]), tuple(parts[: len(queries)])
