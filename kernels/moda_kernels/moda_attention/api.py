"""``moda_attention``: the functional form of the operator.

The operator is a pair of custom ops (``moda::attention`` and ``moda::attention_backward``) with fake implementations, so
that ``torch.compile`` sees one node and never looks inside. Arguments are checked inside the op: once, for eager and compiled
callers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .backend import get_backend
from .problem import as_run, make_problem, slot_tensor
from .tensors import DepthGradients, Inputs, Result


class _Call:
    """One checked call. Numbers in ``slots`` that leave none out become a view of the depth tensors."""

    def __init__(
        self, x: Inputs, cu_seqlens: Tensor | None, slots: Tensor | None, causal: bool, scale: float | None, depth_chunk: int,
        backend: str,
    ) -> None:  # fmt: skip
        p = make_problem(x, causal=causal, scale=scale, depth_chunk=depth_chunk, cu_seqlens=cu_seqlens, slots=slots)
        run = (0, p.n_slots) if p.slots is None else as_run(p.slots)
        self.run = slice(None) if run is None else slice(*run)
        self.problem = p if run is None else replace(p, slots=None)
        self.backend = get_backend(backend, p.kind)

    def _read(self, x: Inputs) -> Inputs:
        if self.problem.n_slots == 0:
            return x._replace(depth_k=None, depth_v=None)
        return x.with_slots(self.run)

    def forward(self, x: Inputs) -> Result:
        return self.backend.forward(self.problem, self._read(x))

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, x: Inputs, saved: Result) -> list[Tensor]:
        """The gradients of q, k, v, depth_k, depth_v, q_depth, in this order, of those that are given."""
        n = self.problem.n_slots
        buffers: list[Tensor] = []
        if x.depth_k is not None:  # slots that are not read keep zeros
            make = torch.empty if n == x.depth_k.shape[0] else torch.zeros
            buffers = [make(x.depth_k.shape, dtype=x.q.dtype, device=x.q.device) for _ in range(2)]
        depth = DepthGradients(buffers[0][self.run], buffers[1][self.run], (0, n)) if n else None
        dq, dk, dv, dqd, _ = self.backend.backward(self.problem, grad_out, grad_lse, self._read(x), saved, depth)
        return [g for g in (dq, dk, dv, *buffers, dqd) if g is not None]


@torch.library.custom_op("moda::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, depth_k: Tensor | None, depth_v: Tensor | None, q_depth: Tensor | None,
    cu_seqlens: Tensor | None, slots: Tensor | None, causal: bool, scale: float | None, depth_chunk: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = Inputs(q, k, v, depth_k, depth_v, q_depth)
    out, lse = _Call(x, cu_seqlens, slots, causal, scale, depth_chunk, backend).forward(x)
    return out, lse


@_attention.register_fake
def _(q, *rest):  # type: ignore[no-untyped-def]
    B, T, Hq, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, Hq, T, dtype=dtype)


@torch.library.custom_op("moda::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, depth_k: Tensor | None,
    depth_v: Tensor | None, q_depth: Tensor | None, cu_seqlens: Tensor | None, slots: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float | None, depth_chunk: int, backend: str,
) -> list[Tensor]:  # fmt: skip
    x = Inputs(q, k, v, depth_k, depth_v, q_depth)
    call = _Call(x, cu_seqlens, slots, causal, scale, depth_chunk, backend)
    return call.backward(grad_out, grad_lse, x, Result(out, lse))


@_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, depth_k, depth_v, q_depth, *rest):  # type: ignore[no-untyped-def]
    inputs = (q, k, v, depth_k, depth_v, q_depth)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], call: _Call | None = None) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.options, ctx.call = inputs[8:], call
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """One gradient for each argument of the op."""
    saved = ctx.saved_tensors
    grad_out = torch.zeros_like(saved[8]) if grad_out is None else grad_out
    if ctx.call is None:
        grads = _attention_backward(grad_out, grad_lse, *saved, *ctx.options)
    else:
        grads = ctx.call.backward(grad_out, grad_lse, Inputs(*saved[:6]), Result(*saved[8:]))
    remaining = iter(grads)
    return (*(None if x is None else next(remaining) for x in saved[:6]), *6 * (None,))


_attention.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same for eager callers: a custom op's dispatch costs 0.25 ms per call, a quarter of the operator at 4,096 tokens."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x = Inputs(*arguments[:6])
        call = _Call(x, *arguments[6:])
        out, lse = call.forward(x)
        _save(ctx, arguments, (out, lse), call)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _differentiate(ctx, *grads)


#: Tensors that the eager path takes; subclasses (fake tensors, DTensor) go through the custom op.
_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def moda_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, depth_k: Tensor | None = None, depth_v: Tensor | None = None, *,
    q_depth: Tensor | None = None, causal: bool = True, scale: float | None = None, depth_chunk: int = 1,
    cu_seqlens: Tensor | None = None, slots: Tensor | Sequence[int] | None = None, backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Mixture-of-Depths Attention (arXiv 2603.15619): sequence and depth keys under one softmax.

    :param q: ``[B, T, Hq, D]`` queries; bf16, fp16, fp32 (fp64: reference only).
    :param k: ``[B, T, Hk, D]`` sequence keys, or None with ``v`` for depth-only attention.
    :param v: ``[B, T, Hk, D]`` sequence values.
    :param depth_k: ``[S, B, T, Hk, D]`` depth keys, slot-major, or None (S = 0: plain attention).
    :param depth_v: ``[S, B, T, Hk, D]`` depth values.
    :param q_depth: ``[B, T, Hq, D]`` query of the depth branch; ``q`` if None.
    :param causal: token t sees the sequence tokens 0..t only. Depth is not concerned: it has no cross-token term.
    :param scale: factor on every logit; ``D ** -0.5`` if None.
    :param depth_chunk: C; token t sees the depth slots of tokens ``floor(t / C) * C .. t``, counted within its document.
    :param cu_seqlens: int32 ``[N + 1]`` boundaries of the documents packed into one row (B = 1); attention and chunks stay
        within a document.
    :param slots: which slots of ``depth_k`` and ``depth_v`` are read: different numbers ``0 .. S - 1``, as ints or an integer
        tensor (one on a GPU costs a synchronisation); None for all. The gradients of the other slots are zero.
    :param backend: ``reference``, ``fused``, ``split`` or ``auto``. An explicit backend runs or raises.
    :param return_lse: also return the natural-log log-sum-exp of every query's logits.

    :returns: ``[B, T, Hq, D]`` in q's dtype, and with ``return_lse`` also ``[B, Hq, T]`` in fp32.

    :raises ValueError: naming the argument, what was expected and what was given.
    """
    if not isinstance(q, Tensor):
        raise ValueError(f"moda_attention: q must be a torch.Tensor, got {type(q).__name__}")
    tensors = (q, k, v, depth_k, depth_v, q_depth, cu_seqlens, slot_tensor(slots))
    compiled = torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in tensors)
    out, lse = (_attention if compiled else _Eager.apply)(*tensors, causal, scale, depth_chunk, backend)
    return (out, lse) if return_lse else out
