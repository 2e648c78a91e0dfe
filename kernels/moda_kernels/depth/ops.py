"""Writing to and reading from a depth stream: custom ops with their autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..moda_attention.backend import get_backend
from ..moda_attention.tensors import Result
from .masked import masked_read
from .past import attend_past, past_gradients
from .stream import DepthStream, stream_of


def _written_slot(row: Tensor, kind: int) -> tuple[DepthStream, int]:
    stream, layer = stream_of(row)
    if (slot := stream.layout.written_slot(layer, kind)) is None:
        raise ValueError(f"depth_write: kind {kind} of layer {layer} must have a slot, got one that no layer reads")
    return stream, slot


@torch.library.custom_op("moda::depth_write", mutates_args=())
def _write(order: Tensor, k: Tensor, v: Tensor, row: Tensor, kind: int) -> Tensor:
    stream, slot = _written_slot(row, kind)
    stream.write(slot, k, v)
    return torch.empty_like(order)


@_write.register_fake
def _(order, k, v, row, kind):  # type: ignore[no-untyped-def]
    return torch.empty_like(order)


@torch.library.custom_op("moda::depth_write_backward", mutates_args=())
def _write_backward(
    grad_order: Tensor, row: Tensor, kind: int, shape: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    stream, slot = _written_slot(row, kind)
    grad_k, grad_v = stream.take_gradient(slot)
    return grad_k, grad_v, torch.empty_like(grad_order)


@_write_backward.register_fake
def _(grad_order, row, kind, shape, dtype):  # type: ignore[no-untyped-def]
    grad = grad_order.new_empty(shape, dtype=dtype)
    return grad, torch.empty_like(grad), torch.empty_like(grad_order)


def _write_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, k, _, row, kind = inputs
    ctx.save_for_backward(row)
    ctx.kind, ctx.shape, ctx.dtype = kind, k.shape, k.dtype


def _write_grad(ctx: Any, grad_order: Tensor) -> tuple[Any, ...]:
    (row,) = ctx.saved_tensors
    grad_k, grad_v, grad_order = _write_backward(grad_order, row, ctx.kind, ctx.shape, ctx.dtype)
    return grad_order, grad_k, grad_v, None, None


_write.register_autograd(_write_grad, setup_context=_write_context)


def depth_write(order: Tensor, k: Tensor, v: Tensor, row: Tensor, kind: int) -> Tensor:
    """Write a layer's slot and return the next ``order``.

    :param order: what the last write or read of this forward pass returned.
    :param k: ``[B, T, Hk, D]`` depth keys in their final form (normalised and rotated as readers will use them).
    :param v: ``[B, T, Hk, D]`` depth values.
    :param row: ``stream.layer_rows[layer]``.
    :param kind: ``ATTENTION`` or ``FFN``.

    :raises ValueError: if no layer reads what would be written.
    """
    return _write(order, k, v, row, kind)


@torch.library.custom_op("moda::depth_attention", mutates_args=())
def _read(
    order: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, q_depth: Tensor | None, depth_bias: Tensor | None,
    cu_seqlens: Tensor | None, row: Tensor, past_k: Tensor | None, past_v: Tensor | None, causal: bool, scale: float | None,
    depth_top: int | None, past: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    stream, layer = stream_of(row)
    x, slots = stream.inputs(layer, q, k, v, q_depth, depth_bias)
    if x.k is None and x.depth_k is None:
        B, T, Hq, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((B, Hq, T), float("-inf"), dtype=wide, device=q.device)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse, torch.empty_like(order)
    p = stream.problem(x, slots, cu_seqlens, causal, scale, depth_top)
    result = get_backend(stream.backend, p.kind).forward(p, x)
    if past_k is not None and past_v is not None:
        result = attend_past(q, past_k, past_v, past, result, scale, stream.backend)
    return *result, torch.empty_like(order)


@_read.register_fake
def _(order, q, *rest):  # type: ignore[no-untyped-def]
    B, T, Hq, _ = q.shape
    lse = q.new_empty(B, Hq, T, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, torch.empty_like(order)


@torch.library.custom_op("moda::depth_attention_backward", mutates_args=())
def _read_backward(
    grad_order: Tensor, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None,
    q_depth: Tensor | None, depth_bias: Tensor | None, cu_seqlens: Tensor | None, out: Tensor, lse: Tensor, row: Tensor,
    past_k: Tensor | None, past_v: Tensor | None, causal: bool, scale: float | None, depth_top: int | None, past: list[int],
) -> list[Tensor]:  # fmt: skip
    stream, layer = stream_of(row)
    stream.begin_backward(layer)
    x, slots = stream.inputs(layer, q, k, v, q_depth, depth_bias)
    of_bias = None if depth_bias is None else torch.zeros_like(depth_bias)
    if x.k is None and x.depth_k is None:
        none_read = [torch.zeros_like(q, memory_format=torch.contiguous_format), of_bias]
        return [torch.empty_like(grad_order), *(g for g in none_read if g is not None)]
    p = stream.problem(x, slots, cu_seqlens, causal, scale, depth_top)
    backend, saved = get_backend(stream.backend, p.kind), Result(out, lse)
    depth = stream.depth_gradients(layer, backend, q)
    dq, dk, dv, dqd, dbias = backend.backward(
        replace(p, partial=past_k is not None), grad_out, grad_lse, x, saved, depth
    )
    if q_depth is not None and dqd is None:  # a layer that reads nothing: its depth query has no part in the output
        dqd = torch.zeros_like(q_depth)
    if of_bias is not None and dbias is not None:
        of_bias[: len(dbias)] = dbias
    of_past: tuple[Tensor, ...] = ()
    if past_k is not None and past_v is not None:
        dq, *of_past = past_gradients(q, past_k, past_v, past, saved, grad_out, dq, scale, stream.backend)  # type: ignore[assignment]
    return [torch.empty_like(grad_order), *(g for g in (dq, dk, dv, dqd, of_bias, *of_past) if g is not None)]


@_read_backward.register_fake
def _(grad_order, grad_out, grad_lse, q, k, v, q_depth, depth_bias, cu_seqlens, out, lse, row, past_k, past_v, *rest):  # type: ignore[no-untyped-def]
    inputs = (q, k, v, q_depth, depth_bias, past_k, past_v)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]
    return [torch.empty_like(grad_order), *grads]


def _read_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, q, k, v, q_depth, depth_bias, cu_seqlens, row, past_k, past_v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, q_depth, depth_bias, cu_seqlens, *output[:2], row, past_k, past_v)


def _read_grad(ctx: Any, grad_out: Tensor, grad_lse: Any, grad_order: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if saved[1] is not None:  # nobody sees the LSE of a read together with the sequence
        grad_lse = None
    order, *grads = _read_backward(grad_order, grad_out, grad_lse, *saved, *ctx.options)
    remaining = iter(grads)
    *own, of_past_k, of_past_v = (None if x is None else next(remaining) for x in (*saved[:5], *saved[-2:]))
    return order, *own, None, None, of_past_k, of_past_v, None, None, None, None


_read.register_autograd(_read_grad, setup_context=_read_context)


def depth_attention(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, row: Tensor, *,
    q_depth: Tensor | None = None, cu_seqlens: Tensor | None = None, causal: bool = True, scale: float | None = None,
    mask: Tensor | None = None, depth_top: int | None = None, depth_bias: Tensor | None = None,
    past: tuple[Tensor, Tensor, list[int]] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer's attention over its sequence K/V and the slots it reads from the stream.

    Arguments are those of :func:`moda_kernels.moda_attention`; ``order`` and ``row`` those of :func:`depth_write`. A packed
    row (``cu_seqlens``) needs B = 1, in the stream's buffers too.

    :param mask: bool ``[B, T, T]``, which sequence keys each query sees, in place of the causal mask; for inference only.
    :param depth_top: how many slots a token's query head sees of those that the layer reads: the ones of the largest logits, and
        what ties with the last of them. None for all. The reference backend alone can.
    :param depth_bias: ``[n]``, fp32 (fp64 with such queries): added to the logits of the slots that the layer reads, in the order
        of slots, the same for all tokens and heads. What is left over where fewer are read has no effect. ``fused`` cannot.
    :param past: earlier keys and values under the same softmax, ``[C, B / R, T, Hk, D]`` each, and R numbers: row ``b * R + r``
        of the batch is a chunk of sequence b. It sees itself causally, and the first ``past[2][r]`` of that sequence's C chunks.

    :returns: the output ``[B, T, Hq, D]`` and the next ``order``.

    :raises ValueError: for a mask together with gradients or ``cu_seqlens``.
    """
    if mask is not None:
        return masked_read(q, k, v, row, q_depth, cu_seqlens, scale, mask, depth_top, depth_bias), order
    past_k, past_v, counts = past or (None, None, [])
    out, _, order = _read(
        order, q, k, v, q_depth, depth_bias, cu_seqlens, row, past_k, past_v, causal, scale, depth_top, counts
    )
    return out, order


def slot_attention(
    q: Tensor, order: Tensor, row: Tensor, own: tuple[Tensor, Tensor] | None = None, *, scale: float | None = None,
    depth_top: int | None = None, depth_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer's attention over the slots it reads from the stream alone, under a softmax of their own.

    With a pair ``own`` each token sees that key and value as well, merged by log-sum-exp. Without one, a layer that reads no
    slot gets zeros.

    :param q: ``[B, T, H, D]``, H a multiple of the slots' heads.
    :param own: keys and values ``[B, T, H, D]`` of one more pair per token.
    :param order, row: those of :func:`depth_write`.
    :param scale, depth_top, depth_bias: those of :func:`depth_attention`, for slots.

    :returns: the output ``[B, T, H, D]`` and the next ``order``.
    """
    out, lse, order = _read(order, q, None, None, None, depth_bias, None, row, None, None, True, scale, depth_top, [])
    if own is None:
        return out, order
    k, v = own
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logit = (q.to(lse.dtype) * k.to(lse.dtype)).sum(-1) * scale
    weight = torch.sigmoid(logit - lse.mT)[..., None]
    return (weight * v + (1 - weight) * out).to(q.dtype), order
