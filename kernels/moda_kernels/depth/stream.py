"""The depth stream: the depth keys and values of one forward pass, and in the backward pass their gradients.

A stream owns two buffers ``[S, B, T, Hk, D]`` (K and V, slot-major) and, once a backward pass has begun, two gradient
buffers of the same shape. They are no larger than the layout needs: in a pass that begins without gradients (evaluation) rows
are used again once their slots have been read for the last time, and in the backward pass gradients take the rows of keys and
values that nothing reads any more, where that fits. A layout may ask for slots in fp8: they are quantised when they are written,
K and V buffers are then e4m3 with two buffers of scales ``[S, B, T, Hk]`` beside them, and gradients stay in the dtype that was
written, in buffers of their own. Layers write slots and read those that the layout names:

    stream = DepthStream(layout)                  one per forward pass, never per module
    order = stream.start()                        a tensor without elements that carries autograd's order
    for layer in range(layout.n_layers):
        row = stream.layer_rows[layer]
        out, order = depth_attention(q, k, v, order, row)
        order = depth_write(order, depth_k, depth_v, row, ATTENTION)
        order = depth_write(order, ffn_k, ffn_v, row, FFN)

How the gradients get home without one tensor per slot and reader: a read's backward adds to the gradient buffers in place,
a write's backward takes its slot's gradient out. ``order`` is an input and an output of every write and read, so that
autograd (and any compiler) keeps their order. The buffers are never inputs, outputs or saved tensors of an op: ops find the
stream and the layer through the values of ``row``, an int64 CPU tensor, so that every layer can share one compiled graph. Slots
come from the layer's index, never from a cursor: activation checkpointing may run a block again, its writes then find their
slots written and its reads see what they saw.

A backend that can leaves its depth gradients to be added later (:mod:`.deferral`): when ``defer`` layers wait (all slots), and
before a slot is taken that any of them read (a window of ``WINDOW`` slots).

The stream lives as long as its autograd graph: the node made by :meth:`DepthStream.start` holds the only strong reference
besides the caller's. That node comes last in a backward pass, and lets go of the buffers: a loss that is kept, as trainers keep
the last microbatch's during the next forward pass, keeps its graph and the stream, but no memory.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..moda_attention.backend import Backend
from ..moda_attention.fp8 import CODES
from ..moda_attention.problem import Problem, as_run, make_problem, slot_table
from ..moda_attention.quantised import Quantised, quantise_to
from ..moda_attention.tensors import DepthGradients, DepthTarget, Inputs
from ..order import begin
from .deferral import Deferral
from .layout import DepthLayout

#: How many layers' depth gradients wait before they are flushed, unless a stream says otherwise. They take
#: ``DEFER * B * T * Hq * 2 * (S + D)`` elements. By measurement: a training step of 36 layers with 71 slots and 32,768 tokens on
#: an H200 took 457 ms with 1, 445 with 4, 441 with 8 (2.3 GB), and 438 with 12 (3.4 GB): 8 has most of it.
DEFER = 8
#: Slots that are flushed together when one of them is taken.
WINDOW = 4

_STREAMS: weakref.WeakValueDictionary[int, DepthStream] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


class DepthStream:
    """Depth keys, values and their gradients for one forward pass.

    Buffers are allocated at the first write, in its shape, dtype (unless the layout asks for fp8) and device; gradient buffers of
    their own at the first read's backward.

    :param layout: which slots are written and read.
    :param backend: the operator's backend, as in :func:`moda_kernels.moda_attention`.
    :param defer: how many layers' depth gradients may wait for a flush; 1 adds each layer's at once, which is also what
        backends do that cannot defer. Memory: ``defer * B * T * Hq * 2 * (S + D)`` elements.
    """

    def __init__(self, layout: DepthLayout, backend: str = "auto", defer: int = DEFER) -> None:
        if defer < 1:
            raise ValueError(f"DepthStream: defer must be >= 1, got {defer}")
        self.layout, self.backend, self.defer = layout, backend, defer
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.scale_k: Tensor | None = None  # of slots in fp8
        self.scale_v: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self.grad_k: Tensor | None = None
        self.grad_v: Tensor | None = None
        # The buffer row of each slot, the slot that each row holds, and the rows whose slots have a gradient.
        self._rows = layout.training.rows
        self._held: dict[int, int] = {}
        self._has_gradient: set[int] = set()
        self._has_backward = True
        self._differentiated: set[int] = set()
        self._deferral: Deferral | None = None
        self._documents: tuple[Tensor, int] | None = None
        handle = next(_HANDLES)
        _STREAMS[handle] = self
        rows = torch.tensor([[handle, layer] for layer in range(layout.n_layers)], dtype=torch.int64, device="cpu")
        #: One int64 CPU tensor per layer, to be handed to that layer's reads and writes.
        self.layer_rows: tuple[Tensor, ...] = rows.unbind(0)

    def start(self, device: torch.device | None = None) -> Tensor:
        """The first ``order``: shape ``[0]``, fp32, requiring a gradient while autograd is on.

        While it is off, the pass keeps nothing for a backward pass, which is then refused.
        """
        self._has_backward = torch.is_grad_enabled()
        if not self._has_backward:
            self._rows = self.layout.rows
        return begin(self, device)

    def end_backward(self) -> None:
        """Let go of the buffers. :raises RuntimeError: if a gradient is left over."""
        self.check_taken()
        self.release()

    def write(self, slot: int, k: Tensor, v: Tensor) -> None:
        """Fill a slot with ``[B, T, Hk, D]`` keys and values; a slot already written is left as it is."""
        row = self._rows[slot]
        if self._held.get(row) == slot:
            return
        if self.k is None or self.v is None:
            training = self.layout.training
            shared = self._has_backward and training.shift < self.layout.n_slots
            rows = training.total if shared else max(self._rows) + 1
            self._dtype, quantised = k.dtype, self.layout.quantised
            self.k = torch.empty((rows, *k.shape), dtype=CODES if quantised else k.dtype, device=k.device)
            self.v = torch.empty_like(self.k)
            if quantised:
                self.scale_k = torch.empty((rows, *k.shape[:-1]), dtype=torch.float32, device=k.device)
                self.scale_v = torch.empty_like(self.scale_k)
        if self.scale_k is None or self.scale_v is None:
            _copy(self.k[row], k)
            _copy(self.v[row], v)
        else:
            quantise_to(k, v, Quantised(self.k[row], self.v[row], self.scale_k[row], self.scale_v[row]))
        self._held[row] = slot

    def inputs(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        q_depth: Tensor | None,
        depth_bias: Tensor | None = None,
    ) -> tuple[Inputs, tuple[int, ...] | None]:
        """What a layer's attention reads, and which rows of the depth tensors these are: None for all of them.

        A run of rows comes as views of the buffers, any other list as the whole buffers and the rows' numbers. The first numbers
        of ``depth_bias`` are those of the slots read, in the order of slots; rows that are used again may have another.
        """
        slots = self.layout.read_slots(layer)
        if not slots:
            return Inputs(q, k, v), None
        missing = [s for s in slots if self._held.get(self._rows[s]) != s]
        if missing or self.k is None or self.v is None:
            raise RuntimeError(f"depth stream: slots {missing} are read before they are written")
        rows = self._rows_read(layer)
        if depth_bias is not None:
            by_row = tuple(sorted(range(len(slots)), key=lambda i: self._rows[slots[i]]))
            as_they_are = by_row == tuple(range(len(slots)))
            depth_bias = depth_bias[slice(len(slots)) if as_they_are else slot_table(by_row, depth_bias.device)]
        x = Inputs(q, k, v, self.k, self.v, q_depth, self.scale_k, self.scale_v, depth_bias)
        run = as_run(rows)
        return (x, rows) if run is None else (x.with_slots(slice(*run)), None)

    def _rows_read(self, layer: int) -> tuple[int, ...]:
        """The rows of the slots that a layer reads, increasing."""
        return tuple(sorted(self._rows[slot] for slot in self.layout.read_slots(layer)))

    def problem(
        self, x: Inputs, slots: tuple[int, ...] | None, cu_seqlens: Tensor | None = None, causal: bool = True,
        scale: float | None = None, depth_top: int | None = None,
    ) -> Problem:  # fmt: skip
        """:func:`make_problem`, reading document boundaries back from the device once per forward pass, not once per layer."""
        longest = None
        if cu_seqlens is not None and self._documents is not None:
            known, length = self._documents  # kept alive, so that the same address is the same boundaries
            longest = length if (known.data_ptr(), known.shape) == (cu_seqlens.data_ptr(), cu_seqlens.shape) else None
        options: dict[str, Any] = dict(causal=causal, scale=scale, slots=slots, depth_top=depth_top)
        p = make_problem(x, cu_seqlens=cu_seqlens, max_seqlen=longest, **options)
        if cu_seqlens is not None and longest is None:
            self._documents = (cu_seqlens, p.max_seqlen)
        return p

    def begin_backward(self, layer: int) -> None:
        """Note that a layer's read is being differentiated, which may happen once."""
        if not self._has_backward:
            raise RuntimeError("depth stream: a forward pass that began without gradients has no backward pass")
        if layer in self._differentiated:
            raise RuntimeError(
                f"depth stream: the backward pass of layer {layer} ran twice over one forward pass; "
                "run the forward pass again instead of keeping its graph (retain_graph)"
            )
        self._differentiated.add(layer)

    def depth_gradients(self, layer: int, backend: Backend, q: Tensor) -> DepthTarget:
        """Where the backward pass of a layer with queries ``q [B, T, Hq, D]`` leaves the gradients of the slots it read."""
        rows = self._rows_read(layer)
        if not rows:
            return None
        if self.defer > 1 and backend.defers:
            if self._deferral is None:
                assert self.k is not None
                layers = min(self.defer, self.layout.n_layers)
                self._deferral = Deferral(backend.pending(layers, self._rows[-1] + 1, q, self.k.shape[3]))
            if self._deferral.full:
                self.flush(0)
            return self._deferral.add(rows)
        to = self._gradients(rows)
        run = as_run(rows)
        return to if run is None else to._replace(k=to.k[slice(*run)], v=to.v[slice(*run)])

    def _gradients(self, rows: tuple[int, ...]) -> DepthGradients:
        """The whole gradient buffers; ``rows`` are about to be stored into or added to."""
        assert self.k is not None and self.v is not None
        if self.grad_k is None or self.grad_v is None:
            shift = self.layout.training.shift
            shared = shift < self.layout.n_slots
            self.grad_k, self.grad_v = (
                x[shift:] if shared else torch.empty_like(x, dtype=self._dtype) for x in (self.k, self.v)
            )
        new = [i for i, row in enumerate(rows) if row not in self._has_gradient]
        first, end = (new[0], new[-1] + 1) if new else (0, 0)
        if len(new) < end - first:  # new slots on both sides of others: give the new ones a value to add to
            for i in new:
                self.grad_k[rows[i]].zero_()
                self.grad_v[rows[i]].zero_()
            first = end = 0
        self._has_gradient.update(rows)
        return DepthGradients(self.grad_k, self.grad_v, (first, end))

    def flush(self, first: int) -> None:
        """Add the deferred gradients of all rows >= ``first``."""
        assert self._deferral is not None
        for layers, rows in self._deferral.take(first):
            self._deferral.pending.flush(layers, rows, self._gradients(rows))

    def take_gradient(self, slot: int) -> tuple[Tensor, Tensor]:
        """The gradients of a slot, handed over: zeros if nothing that was differentiated has read it."""
        assert self.k is not None
        row = self._rows[slot]
        if self._deferral is not None and self._deferral.covers(row):
            self.flush(row // WINDOW * WINDOW)
        if self.grad_k is None or self.grad_v is None or row not in self._has_gradient:
            return torch.zeros_like(self.k[row], dtype=self._dtype), torch.zeros_like(self.k[row], dtype=self._dtype)
        self._has_gradient.remove(row)
        return self.grad_k[row], self.grad_v[row]

    def release(self) -> None:
        """Let go of all buffers, once the backward pass has used them."""
        self.k = self.v = self.scale_k = self.scale_v = self.grad_k = self.grad_v = self._deferral = None
        self._held.clear()

    def copy(self, layer: int) -> Tensor:
        """A copy ``[2 S, B, T, Hk, D]`` of the keys and then the values that a layer reads."""
        if self.layout.quantised:
            raise RuntimeError("depth stream: slots in fp8 do not leave their stream")
        rows = [self._rows[slot] for slot in self.layout.read_slots(layer)]
        assert self.k is not None and self.v is not None and self._held.keys() >= set(rows)
        return torch.stack([x[row] for x in (self.k, self.v) for row in rows])

    def deposit(self, layer: int, grad: Tensor) -> None:
        """The gradient of that copy, for the slots' writers to take. Before those of any other read."""
        self.begin_backward(layer)
        rows = tuple(self._rows[slot] for slot in self.layout.read_slots(layer))
        assert not self._has_gradient and self._deferral is None
        to = self._gradients(rows)
        torch._foreach_copy_([x[row] for x in (to.k, to.v) for row in rows], list(grad.unbind()))

    def check_taken(self) -> None:
        """Refuse gradients that no writer has taken at the end of a backward pass."""
        waiting = self._deferral is not None and any(map(self._deferral.covers, self._held))
        if self._has_gradient or waiting:
            raise RuntimeError(f"depth stream: gradients of the rows {sorted(self._has_gradient)} were not taken")


def stream_of(row: Tensor) -> tuple[DepthStream, int]:
    """The stream and the layer that a row of ``layer_rows`` stands for."""
    handle, layer = row.tolist()
    if (stream := _STREAMS.get(handle)) is None:
        raise RuntimeError("depth stream: the forward pass that this row belongs to is gone")
    return stream, layer


def _copy(to: Tensor, x: Tensor) -> None:
    """``to.copy_(x)``, 8 bytes at a time where possible: PyTorch copies strided halves singly (2.6 times slower on an H200)."""
    wide = 8 // x.element_size()
    aligned = not any(n % wide for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    if wide > 1 and aligned and not x.is_contiguous() and x.stride(-1) == 1 and x.dtype == to.dtype:
        to, x = to.view(torch.int64), x.view(torch.int64)
    to.copy_(x)
