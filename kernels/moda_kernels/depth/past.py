"""Attention to earlier chunks of a sequence, merged into that of each chunk to itself (context parallelism).

A backend knows equally many queries and keys. So a chunk's queries meet every earlier chunk by itself, without a mask, and the
outputs are merged by log-sum-exp, which is exact. The backward pass gives each part the merged output and LSE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..moda_attention.backend import Backend, get_backend
from ..moda_attention.problem import Problem, make_problem
from ..moda_attention.tensors import Inputs, Result


def _by_chunk(x: Tensor, past: list[int]) -> Tensor:
    """``[B, R, ...]`` of ``[B * R, ...]``."""
    return x.unflatten(0, (-1, len(past)))


def _parts(
    q: Tensor, k: Tensor, v: Tensor, past: list[int], scale: float | None, name: str
) -> Iterator[tuple[int, int, Inputs, Problem, Backend]]:
    """The chunk r of the queries and c of the keys that meet, with their problem and backend."""
    for r, count in enumerate(past):
        for c in range(count):
            x = Inputs(_by_chunk(q, past)[:, r], k[c], v[c])
            p = make_problem(x, causal=False, scale=scale)
            yield r, c, x, p, get_backend(name, p.kind)


def attend_past(
    q: Tensor, k: Tensor, v: Tensor, past: list[int], own: Result, scale: float | None, backend: str
) -> Result:
    """``own``, the result of the chunks by themselves, together with what each sees of earlier ones.

    :param q: ``[B * R, T, Hq, D]``. :param k, v: ``[C, B, T, Hk, D]``, chunks in order.
    :param past: for each of the R chunks, how many of the C it sees.
    """
    out, lse = own.out.to(own.lse.dtype, copy=True), own.lse.clone()
    outs, lses = _by_chunk(out, past), _by_chunk(lse, past)
    for r, _, x, p, with_backend in _parts(q, k, v, past, scale, backend):
        part = with_backend.forward(p, x)
        weight = torch.sigmoid(part.lse - lses[:, r])
        outs[:, r].add_(weight.mT[..., None] * (part.out - outs[:, r]))
        lses[:, r].copy_(torch.logaddexp(part.lse, lses[:, r]))
    return Result(out.to(q.dtype), lse)


def past_gradients(
    q: Tensor, k: Tensor, v: Tensor, past: list[int], merged: Result, grad_out: Tensor, dq: Tensor, scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q (``dq``, that of the chunks by themselves, included), k and v, added up in fp32 or above."""
    wide = merged.lse.dtype
    total = dq.to(wide, copy=True)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    grads, outs, lses = (_by_chunk(x, past) for x in (grad_out, *merged))
    for r, c, x, p, with_backend in _parts(q, k, v, past, scale, backend):
        saved = Result(outs[:, r], lses[:, r].contiguous())
        part = with_backend.backward(replace(p, partial=True), grads[:, r], None, x, saved, None)
        assert part.k is not None and part.v is not None
        _by_chunk(total, past)[:, r].add_(part.q)
        dk[c] += part.k
        dv[c] += part.v
    return total.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@torch.library.custom_op("moda::past_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past: list[int], scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    x = Inputs(q, k, v)
    p = make_problem(x, causal=True, scale=scale)
    own = get_backend(backend, p.kind).forward(p, x)
    out, lse = attend_past(q, past_k, past_v, past, own, scale, backend)
    return out, lse


@_attend.register_fake
def _(q, *rest):  # type: ignore[no-untyped-def]
    B, T, Hq, _ = q.shape
    lse = q.new_empty(B, Hq, T, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("moda::past_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, out: Tensor, lse: Tensor,
    past: list[int], scale: float | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    x, merged = Inputs(q, k, v), Result(out, lse)
    p = make_problem(x, causal=True, scale=scale)
    own = get_backend(backend, p.kind).backward(replace(p, partial=True), grad_out, None, x, merged, None)
    assert own.k is not None and own.v is not None
    dq, *of_past = past_gradients(q, past_k, past_v, past, merged, grad_out, own.q, scale, backend)
    return [dq, own.k, own.v, *of_past]


@_attend_backward.register_fake
def _(grad_out, q, k, v, past_k, past_v, *rest):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, past_k, past_v)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, past, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = past, scale, backend


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Any) -> tuple[Any, ...]:
    return (*_attend_backward(grad_out, *ctx.saved_tensors, *ctx.options), None, None, None)


_attend.register_autograd(_gradients, setup_context=_context)


def past_attention(
    q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor, list[int]], *, scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal attention of chunks of sequences, without slots. The arguments are those of :func:`moda_kernels.depth_attention`."""
    past_k, past_v, counts = past
    out: Tensor = _attend(q, k, v, past_k, past_v, counts, scale, backend)[0]
    return out
