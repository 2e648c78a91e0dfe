"""The depth stream: the depth keys and values of one forward pass, and in the backward pass their gradients.

A stream owns two buffers ``[S, B, T, Hk, D]`` (K and V, slot-major) and, once a backward pass has begun, two gradient
buffers of the same shape. Layers write slots and read ranges of slots:

    stream = DepthStream(layout)                  one per forward pass, never per module
    token = stream.start()                        a tensor without elements that carries autograd's order
    for layer in range(layout.n_layers):
        control = stream.control[layer]
        out, token = depth_attention(q, k, v, token, control)
        token = depth_write(token, depth_k, depth_v, control, ATTENTION)
        token = depth_write(token, ffn_k, ffn_v, control, FFN)

How the gradients get home without one tensor per slot and reader: a read's backward adds to the gradient buffers in place,
a write's backward takes its slot's gradient out. The token is an input and an output of every write and read, so that
autograd (and any compiler) keeps their order. The buffers are never inputs, outputs or saved tensors of an op: ops find the
stream through the integer handle in ``control``, an int64 CPU tensor whose *values* tell layers apart, so that every layer
can share one compiled graph. Slots and ranges come from the layer's index, never from a cursor: activation checkpointing
may run a block again, its writes then find their slots written and its reads see what they saw.

Adding a layer's depth gradients to all the slots it read is a read-modify-write of every one of them. With the ``split`` backend
layers *defer* that: the backward of a read keeps its p, ds, q and do, and one flush adds what several layers owe with a single
read-modify-write per slot. Flushes happen when ``defer`` layers are kept (all slots), and before a slot is taken that any of
them covers (a window of ``WINDOW`` slots). Exact for any slots; what layers owe is a range of slots each.

The stream lives as long as its autograd graph: the node made by :meth:`DepthStream.start` holds the only strong reference
besides the caller's.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from .moda_attention.api import Backend, get_backend
from .moda_attention.masked import masked_attention, merge
from .moda_attention.problem import Problem, make_problem

__all__ = ["ATTENTION", "FFN", "DepthLayout", "DepthStream", "depth_attention", "depth_write"]

ATTENTION = 0
FFN = 1

#: How many layers' depth gradients are kept before they are flushed, unless a stream is told otherwise. They take
#: ``DEFER * B * T * Hq * 2 * (S + D)`` elements. By measurement: a training step of 36 layers with 71 slots and 32,768 tokens on
#: an H200 took 457 ms with 1, 445 with 4, 441 with 8 (2.3 GB), and 438 with 12 (3.4 GB): 8 has most of it.
DEFER = 8
#: Slots that are flushed together when one of them is taken.
WINDOW = 4

_HANDLE, _LAYER, _READ_FROM, _READ_TO, _WRITE = range(5)  # columns of a control row; _WRITE + kind is the slot written


@dataclass(frozen=True)
class DepthLayout:
    """Which slots a model of ``n_layers`` layers writes and reads.

    In order of writing: layer 0 attention, layer 0 FFN, layer 1 attention, ... A layer reads the slots written by the
    layers before it, the last ``window`` of them if a window is set. What no layer reads is not written at all.

    :param n_layers: L.
    :param ffn: whether FFN inputs give slots too.
    :param window: how many of the most recent slots a layer reads; None for all.
    """

    n_layers: int
    ffn: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise ValueError(f"DepthLayout: n_layers must be >= 1, got {self.n_layers}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"DepthLayout: window must be >= 1 or None, got {self.window}")

    @property
    def _per_layer(self) -> int:
        return 2 if self.ffn else 1

    def _candidate_range(self, layer: int) -> tuple[int, int]:
        end = layer * self._per_layer
        return (0 if self.window is None else max(0, end - self.window)), end

    def _is_read(self, candidate: int) -> bool:
        first_reader = candidate // self._per_layer + 1
        return first_reader < self.n_layers and self._candidate_range(first_reader)[0] <= candidate

    def _slot(self, candidate: int) -> int:
        """Slots written before ``candidate``: the candidates that no layer reads have none."""
        return sum(self._is_read(c) for c in range(candidate))

    def read_range(self, layer: int) -> tuple[int, int]:
        """The slots ``(first, end)`` that a layer reads."""
        lo, hi = self._candidate_range(layer)
        return self._slot(lo), self._slot(hi)

    def written_slot(self, layer: int, kind: int) -> int | None:
        """The slot that a layer's attention (0) or FFN (1) writes, or None if it writes none."""
        if kind == FFN and not self.ffn:
            return None
        candidate = layer * self._per_layer + kind
        return self._slot(candidate) if self._is_read(candidate) else None

    @property
    def n_slots(self) -> int:
        """S of the buffers."""
        return self._slot(self.n_layers * self._per_layer)

    @property
    def slots_read(self) -> int:
        """The sum over layers of the slots they read."""
        return sum(hi - lo for lo, hi in map(self.read_range, range(self.n_layers)))


_STREAMS: weakref.WeakValueDictionary[int, DepthStream] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


class _Hold(torch.autograd.Function):
    """Gives the first token and keeps the stream alive until the last node of the graph is gone."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, stream: DepthStream) -> torch.Tensor:
        ctx.stream = stream
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class DepthStream:
    """Depth keys, values and their gradients for one forward pass.

    Buffers are allocated at the first write, in its shape, dtype and device; gradient buffers at the first read's backward.

    :param layout: which slots are written and read.
    :param backend: the operator's backend, as in :func:`moda_kernels.moda_attention`.
    :param defer: how many layers' depth gradients are kept before a flush; 1 adds each layer's at once, which is also what
        backends other than ``split`` do. Memory: ``defer * B * T * Hq * 2 * (S + D)`` elements.
    """

    def __init__(self, layout: DepthLayout, backend: str = "auto", defer: int = DEFER) -> None:
        if defer < 1:
            raise ValueError(f"DepthStream: defer must be >= 1, got {defer}")
        self.layout = layout
        self.backend = backend
        self.defer = defer
        self.handle = next(_HANDLES)
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None
        self.grad_k: torch.Tensor | None = None
        self.grad_v: torch.Tensor | None = None
        self._written = [False] * layout.n_slots
        self._touched = [False] * layout.n_slots
        self._differentiated: set = set()
        self._pending: Any = None
        self._owed: list[tuple[int, int]] = []  # for each layer kept in _pending, the slots lo..hi not flushed yet
        self._documents: tuple[torch.Tensor, int] | None = None
        _STREAMS[self.handle] = self
        rows = []
        for layer in range(layout.n_layers):
            slots = [layout.written_slot(layer, kind) for kind in (ATTENTION, FFN)]
            rows.append([self.handle, layer, *layout.read_range(layer), *(-1 if s is None else s for s in slots)])
        #: One int64 CPU tensor per layer, to be handed to that layer's reads and writes.
        self.control: tuple[torch.Tensor, ...] = torch.tensor(rows, dtype=torch.int64, device="cpu").unbind(0)

    def start(self, device: torch.device | None = None) -> torch.Tensor:
        """The first token: shape ``[0]``, fp32, requiring a gradient while autograd is on."""
        anchor = torch.empty(0, device=device, requires_grad=torch.is_grad_enabled())
        token = _Hold.apply(anchor, self)
        assert isinstance(token, torch.Tensor)
        return token

    def write(self, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill a slot with ``[B, T, Hk, D]`` keys and values; a slot already written is left as it is."""
        if self._written[slot]:
            return
        if self.k is None or self.v is None:
            self.k = torch.empty((self.layout.n_slots, *k.shape), dtype=k.dtype, device=k.device)
            self.v = torch.empty_like(self.k)
        _copy(self.k[slot], k)
        _copy(self.v[slot], v)
        self._written[slot] = True

    def read(self, lo: int, hi: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Views ``[hi - lo, B, T, Hk, D]`` of the keys and values of slots lo..hi, or None if there are none."""
        if lo == hi:
            return None, None
        if self.k is None or self.v is None or not all(self._written[lo:hi]):
            missing = [s for s in range(lo, hi) if not self._written[s]]
            raise RuntimeError(f"depth stream: slots {missing} are read before they are written")
        return self.k[lo:hi], self.v[lo:hi]

    def begin_backward(self, layer: int) -> None:
        """Note that a layer's read is being differentiated, which may happen once."""
        if layer in self._differentiated:
            raise RuntimeError(
                f"depth stream: the backward pass of layer {layer} ran twice over one forward pass; "
                "run the forward pass again instead of keeping its graph (retain_graph)"
            )
        self._differentiated.add(layer)

    def _gradients(self, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """The whole gradient buffers, and which of the slots lo..hi, about to be written, are to be stored, not added to."""
        assert self.k is not None
        if self.grad_k is None or self.grad_v is None:
            self.grad_k, self.grad_v = torch.empty_like(self.k), torch.empty_like(self.k)
        new = [s for s in range(lo, hi) if not self._touched[s]]
        first, end = (new[0], new[-1] + 1) if new else (lo, lo)
        if len(new) < end - first:  # new slots on both sides of old ones: give the new ones a value to add to
            for s in new:
                self.grad_k[s].zero_()
                self.grad_v[s].zero_()
            first = end = lo
        self._touched[lo:hi] = [True] * (hi - lo)
        return self.grad_k, self.grad_v, (first, end)

    def gradient_range(self, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Gradient buffers of slots lo..hi and the part of them, counted from lo, that is to be stored, not added to."""
        grad_k, grad_v, (first, end) = self._gradients(lo, hi)
        return grad_k[lo:hi], grad_v[lo:hi], (first - lo, end - lo)

    def keep(self, lo: int, hi: int, q: torch.Tensor) -> Any:
        """Room for the depth gradients that a layer owes to slots lo..hi, to be flushed later.

        :param q: ``[B, T, Hq, D]`` like the layer's queries.
        :returns: ``split.Deferred``.
        """
        from .moda_attention.depth_backward import MAX_PRODUCTS, Pending
        from .moda_attention.split import Deferred

        if self._pending is None:
            assert self.k is not None
            group = q.shape[2] // self.k.shape[3]
            layers = max(1, min(self.defer, self.layout.n_layers, MAX_PRODUCTS // group))
            self._pending = Pending(layers, self.layout.n_slots, q)
        if len(self._owed) == self._pending.layers:
            self.flush(0)
        self._owed.append((lo, hi))
        return Deferred(self._pending, len(self._owed) - 1, lo)

    def flush(self, first: int) -> None:
        """Add what the kept layers owe to all slots >= ``first``."""
        from .moda_attention.depth_backward import flush

        owed = [(max(lo, first), hi) for lo, hi in self._owed]
        edges = sorted({edge for lo, hi in owed if lo < hi for edge in (lo, hi)})
        ranges: list[tuple[int, int, int, int]] = []  # layers i..j owe to slots a..b
        for a, b in zip(edges, edges[1:]):
            layers = [m for m, (lo, hi) in enumerate(owed) if lo <= a and b <= hi]
            for i in layers:
                if ranges and ranges[-1][1] == i and ranges[-1][2] == a:
                    ranges[-1] = (ranges[-1][0], i + 1, a, b)
                else:
                    ranges.append((i, i + 1, a, b))
        for i, j, a, b in ranges:
            flush(self._pending, (i, j), (a, b), *self._gradients(a, b))
        self._owed = [(lo, min(hi, first)) for lo, hi in self._owed]
        if all(lo >= hi for lo, hi in self._owed):
            self._owed.clear()

    def take_gradient(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of a slot, handed over: zeros if nothing that was differentiated has read it."""
        assert self.k is not None
        if any(lo <= slot < hi for lo, hi in self._owed):
            self.flush(slot // WINDOW * WINDOW)
        if self.grad_k is None or self.grad_v is None or not self._touched[slot]:
            return torch.zeros_like(self.k[slot]), torch.zeros_like(self.k[slot])
        self._touched[slot] = False
        return self.grad_k[slot], self.grad_v[slot]

    def problem(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        depth_k: torch.Tensor | None,
        depth_v: torch.Tensor | None,
        q_depth: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Problem:
        """:func:`make_problem`, reading document boundaries back from the device once per forward pass, not once per layer."""
        known = self._documents
        cu = cu_seqlens
        if cu is not None and known is not None and known[0].data_ptr() == cu.data_ptr() and known[0].shape == cu.shape:
            cu = None  # `known` keeps the tensor alive, so that the same address is the same boundaries
        p = make_problem(q, k, v, depth_k, depth_v, q_depth=q_depth, causal=causal, scale=scale, cu_seqlens=cu)
        if cu_seqlens is None:
            return p
        if cu is not None:
            self._documents = (cu, p.max_seqlen)
            return p
        assert known is not None
        return replace(p, cu_seqlens=cu_seqlens, max_seqlen=known[1])


def _copy(to: torch.Tensor, x: torch.Tensor) -> None:
    """``to.copy_(x)``. PyTorch moves strided half-precision numbers two bytes at a time (2.6 times slower on an H200): here the
    same bits go as 64-bit integers where strides and offset allow."""
    wide = 8 // x.element_size()
    sizes = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    if (
        wide > 1
        and not x.is_contiguous()
        and x.stride(-1) == 1
        and x.dtype == to.dtype
        and not any(n % wide for n in sizes)
    ):
        to.view(torch.int64).copy_(x.view(torch.int64))
    else:
        to.copy_(x)


def _stream(control: torch.Tensor) -> tuple[DepthStream, list[int]]:
    row = control.tolist()
    stream = _STREAMS.get(row[_HANDLE])
    if stream is None:
        raise RuntimeError("depth stream: the forward pass that this token belongs to is gone")
    return stream, row


# --- write ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("moda::depth_write", mutates_args=())
def _write(token: torch.Tensor, k: torch.Tensor, v: torch.Tensor, control: torch.Tensor, kind: int) -> torch.Tensor:
    stream, row = _stream(control)
    stream.write(row[_WRITE + kind], k, v)
    return torch.empty_like(token)


@_write.register_fake
def _(token, k, v, control, kind):  # type: ignore[no-untyped-def]
    return torch.empty_like(token)


@torch.library.custom_op("moda::depth_write_backward", mutates_args=())
def _write_backward(
    grad_token: torch.Tensor, control: torch.Tensor, kind: int, shape: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream, row = _stream(control)
    grad_k, grad_v = stream.take_gradient(row[_WRITE + kind])
    return grad_k, grad_v, torch.empty_like(grad_token)


@_write_backward.register_fake
def _(grad_token, control, kind, shape, dtype):  # type: ignore[no-untyped-def]
    grad = grad_token.new_empty(shape, dtype=dtype)
    return grad, torch.empty_like(grad), torch.empty_like(grad_token)


def _write_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, k, _, control, kind = inputs
    ctx.save_for_backward(control)
    ctx.kind, ctx.shape, ctx.dtype = kind, k.shape, k.dtype


def _write_grad(ctx: Any, grad_token: torch.Tensor) -> tuple[Any, ...]:
    (control,) = ctx.saved_tensors
    grad_k, grad_v, grad_token = _write_backward(grad_token, control, ctx.kind, ctx.shape, ctx.dtype)
    return grad_token, grad_k, grad_v, None, None


_write.register_autograd(_write_grad, setup_context=_write_context)


def depth_write(
    token: torch.Tensor, k: torch.Tensor, v: torch.Tensor, control: torch.Tensor, kind: int
) -> torch.Tensor:
    """Write a layer's slot and return the next token.

    :param token: what the last write or read of this forward pass returned.
    :param k: ``[B, T, Hk, D]`` depth keys in their final form (normalised and rotated as readers will use them).
    :param v: ``[B, T, Hk, D]`` depth values.
    :param control: ``stream.control[layer]``.
    :param kind: ``ATTENTION`` or ``FFN``.
    """
    return _write(token, k, v, control, kind)


def _can_defer(backend: Backend) -> bool:
    return backend.name == "split"


# --- read -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("moda::depth_attention", mutates_args=())
def _read(
    token: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_depth: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    control: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream, row = _stream(control)
    depth_k, depth_v = stream.read(row[_READ_FROM], row[_READ_TO])
    qd = None if depth_k is None else q_depth
    p = stream.problem(q, k, v, depth_k, depth_v, qd, cu_seqlens, causal, scale)
    out, lse = get_backend(stream.backend, p).forward(p, q, k, v, depth_k, depth_v, qd)
    return out, lse, torch.empty_like(token)


@_read.register_fake
def _(token, q, k, v, q_depth, cu_seqlens, control, causal, scale):  # type: ignore[no-untyped-def]
    B, T, Hq, _ = q.shape
    lse = q.new_empty(B, Hq, T, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, torch.empty_like(token)


@torch.library.custom_op("moda::depth_attention_backward", mutates_args=())
def _read_backward(
    grad_token: torch.Tensor,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_depth: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    control: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> list[torch.Tensor]:
    stream, row = _stream(control)
    stream.begin_backward(row[_LAYER])
    lo, hi = row[_READ_FROM], row[_READ_TO]
    depth_k, depth_v = stream.read(lo, hi)
    qd = None if depth_k is None else q_depth
    p = stream.problem(q, k, v, depth_k, depth_v, qd, cu_seqlens, causal, scale)
    backend = get_backend(stream.backend, p)
    arguments = (p, grad_out, None, q, k, v, depth_k, depth_v, qd, out, lse)
    if depth_k is None:
        grads = backend.backward(*arguments, None, None, (0, 0))
    elif stream.defer > 1 and _can_defer(backend):
        grads = backend.backward(*arguments, None, None, (0, 0), deferred=stream.keep(lo, hi, q))  # type: ignore[call-arg]
    else:
        grads = backend.backward(*arguments, *stream.gradient_range(lo, hi))
    dq, dk, dv, dqd = grads
    if q_depth is not None and dqd is None:  # a layer that reads nothing: its depth query has no part in the output
        dqd = torch.zeros_like(q_depth)
    return [torch.empty_like(grad_token), *(g for g in (dq, dk, dv, dqd) if g is not None)]


@_read_backward.register_fake
def _(grad_token, grad_out, q, k, v, q_depth, *rest):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, q_depth) if x is not None]
    return [torch.empty_like(grad_token), *grads]


def _read_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, q, k, v, q_depth, cu_seqlens, control, causal, scale = inputs
    out, lse, token = output
    ctx.save_for_backward(q, k, v, q_depth, cu_seqlens, out, lse, control)
    ctx.options = (causal, scale)


def _read_grad(ctx: Any, grad_out: torch.Tensor, grad_lse: Any, grad_token: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, q_depth, cu_seqlens, out, lse, control = ctx.saved_tensors
    grads = _read_backward(
        grad_token, grad_out, q, k, v, q_depth, cu_seqlens, out, lse, control, *ctx.options
    )  # fmt: skip
    dqd = grads[4] if q_depth is not None else None
    return grads[0], grads[1], grads[2], grads[3], dqd, None, None, None, None


_read.register_autograd(_read_grad, setup_context=_read_context)


def depth_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    token: torch.Tensor,
    control: torch.Tensor,
    *,
    q_depth: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's attention over its sequence K/V and the slots it reads from the stream.

    Arguments are those of :func:`moda_kernels.moda_attention`; ``token`` and ``control`` those of :func:`depth_write`. A packed
    row (``cu_seqlens``) needs B = 1, in the stream's buffers too.

    :param mask: bool ``[B, T, T]``, which sequence keys each query sees, in place of the causal mask; for inference only.

    :returns: the output ``[B, T, Hq, D]`` and the next token.

    :raises ValueError: for a mask together with gradients or ``cu_seqlens``.
    """
    if mask is not None:
        return _masked_read(q, k, v, token, control, q_depth, cu_seqlens, scale, mask)
    out, _, token = _read(token, q, k, v, q_depth, cu_seqlens, control, causal, scale)
    return out, token


def _masked_read(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    token: torch.Tensor,
    control: torch.Tensor,
    q_depth: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float | None,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence under ``mask`` and depth apart, merged by log-sum-exp."""
    if cu_seqlens is not None or torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("depth_attention: mask is for inference without packed documents, got cu_seqlens or gradients")
    expected = (q.shape[0], q.shape[1], q.shape[1])
    if mask.dtype != torch.bool or mask.shape != expected or mask.device != q.device:
        raise ValueError(
            f"depth_attention: mask must be bool of shape {list(expected)} on {q.device}, got {mask.dtype} "
            f"{list(mask.shape)} on {mask.device}"
        )
    out, lse = masked_attention(q, k, v, mask, scale)
    stream, row = _stream(control)
    depth_k, depth_v = stream.read(row[_READ_FROM], row[_READ_TO])
    if depth_k is None or depth_v is None:
        return out, token
    p = make_problem(q, None, None, depth_k, depth_v, q_depth=q_depth, scale=scale)
    backend = get_backend(stream.backend, p)
    if backend.name == "split":  # merges as it reads
        from .moda_attention.depth_forward import depth_forward

        query = q if q_depth is None else q_depth
        return depth_forward(query, depth_k, depth_v, p.scale, seq_out=out, seq_lse=lse.contiguous())[0], token
    deep, deep_lse = backend.forward(p, q, None, None, depth_k, depth_v, q_depth)
    return merge(out, lse, deep, deep_lse), token
