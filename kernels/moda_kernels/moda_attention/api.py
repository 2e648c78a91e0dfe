"""``moda_attention``: the functional form of the operator, its backends and how one is chosen.

The operator is a pair of custom ops (``moda::attention`` and ``moda::attention_backward``) with fake implementations, so
that ``torch.compile`` sees one node and never looks inside. Arguments are checked inside the op: once, for eager and compiled
callers alike.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any, Protocol, cast

import torch

from .problem import Problem, make_problem

__all__ = ["Backend", "available_backends", "choose_backend", "get_backend", "moda_attention"]

log = logging.getLogger(__name__)

BACKENDS = ("reference", "fused", "split")


class Backend(Protocol):
    """What a backend provides; each is a module of this package. Shapes are those of :func:`moda_attention`."""

    name: str

    def unsupported(self, p: Problem) -> str | None:
        """Why this backend cannot solve ``p``, naming the argument, or None if it can."""
        ...

    def forward(
        self,
        p: Problem,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        depth_k: torch.Tensor | None,
        depth_v: torch.Tensor | None,
        q_depth: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, T, Hq, D]`` and natural-log LSE ``[B, Hq, T]``."""
        ...

    def backward(
        self,
        p: Problem,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        depth_k: torch.Tensor | None,
        depth_v: torch.Tensor | None,
        q_depth: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_depth_k: torch.Tensor | None,
        grad_depth_v: torch.Tensor | None,
        fresh: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of q, k, v, q_depth. Depth gradients go into the buffers: ``fresh`` slots stored, others added."""
        ...


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f".{name}", __package__))


def available_backends() -> list[str]:
    """Names of the backends whose requirements this machine has (a CUDA device is not looked for)."""
    return [n for n in BACKENDS if n == "reference" or _triton_missing() is None]


def get_backend(name: str, p: Problem) -> Backend:
    """The backend called ``name``, or the one that :func:`choose_backend` picks for ``"auto"``.

    :raises ValueError: for an unknown name, a backend this machine does not have, or one that cannot solve ``p``.
    """
    if name == "auto":
        return choose_backend(p)
    if name not in BACKENDS:
        raise ValueError(f"moda_attention: backend must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    if name != "reference":
        missing = _triton_missing()
        if missing is not None:
            raise ValueError(f"moda_attention: backend {name!r} cannot run here: {missing}")
    backend = _load(name)
    reason = backend.unsupported(p)
    if reason is not None:
        raise ValueError(f"moda_attention: backend {name!r} cannot run this: {reason}")
    return backend


def choose_backend(p: Problem) -> Backend:
    """The fastest backend that can solve ``p`` on its device; the choice is logged once for each kind of problem."""
    kind = (p.device.type, p.dtype, p.head_dim, p.causal, p.depth_chunk, p.has_sequence, p.cu_seqlens is not None)
    return _load(_choice(kind, p))


_CHOICES: dict = {}


def _choice(kind: tuple[Any, ...], p: Problem) -> str:
    if kind not in _CHOICES:
        name = "reference"
        if p.device.type == "cuda" and _triton_missing() is None:
            # split first: the faster of the two in nearly every row of kernels/results.
            name = next((n for n in ("split", "fused") if _load(n).unsupported(p) is None), "reference")
        _CHOICES[kind] = name
        log.info(
            "moda_attention: backend auto chose %r for %s %s, head dim %d, causal=%s, depth_chunk=%d",
            name, p.device.type, str(p.dtype).removeprefix("torch."), p.head_dim, p.causal, p.depth_chunk,
        )  # fmt: skip
    return _CHOICES[kind]


def _attention_implementation(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    depth_chunk: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    p = make_problem(
        q, k, v, depth_k, depth_v, q_depth=q_depth, causal=causal, scale=scale, depth_chunk=depth_chunk,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return get_backend(backend, p).forward(p, q, k, v, depth_k, depth_v, q_depth)


_attention = torch.library.custom_op("moda::attention", _attention_implementation, mutates_args=())


@_attention.register_fake
def _(q, k, v, depth_k, depth_v, q_depth, cu_seqlens, causal, scale, depth_chunk, backend):  # type: ignore[no-untyped-def]
    B, T, Hq, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, Hq, T, dtype=dtype)


def _solve_backward(
    p: Problem,
    solver: Backend,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of q, k, v, depth_k, depth_v, q_depth, in this order, of those that are given."""
    grad_dk = None if depth_k is None else torch.empty(depth_k.shape, dtype=q.dtype, device=q.device)
    grad_dv = None if depth_v is None else torch.empty(depth_v.shape, dtype=q.dtype, device=q.device)
    dq, dk, dv, dqd = solver.backward(
        p, grad_out, grad_lse, q, k, v, depth_k, depth_v, q_depth, out, lse, grad_dk, grad_dv, (0, p.n_slots)
    )
    return [g for g in (dq, dk, dv, grad_dk, grad_dv, dqd) if g is not None]


def _attention_backward_implementation(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float | None,
    depth_chunk: int,
    backend: str,
) -> list[torch.Tensor]:
    p = make_problem(
        q, k, v, depth_k, depth_v, q_depth=q_depth, causal=causal, scale=scale, depth_chunk=depth_chunk,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    solver = get_backend(backend, p)
    return _solve_backward(p, solver, grad_out, grad_lse, q, k, v, depth_k, depth_v, q_depth, out, lse)


_attention_backward = torch.library.custom_op(
    "moda::attention_backward", _attention_backward_implementation, mutates_args=()
)


@_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, depth_k, depth_v, q_depth, *rest):  # type: ignore[no-untyped-def]
    inputs = (q, k, v, depth_k, depth_v, q_depth)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, causal, scale, depth_chunk, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (causal, scale, depth_chunk, backend)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, backward: Any
) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    inputs, out = tensors[:6], tensors[7]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = iter(backward(grad_out, grad_lse, *tensors, *ctx.options))
    return (*(None if x is None else next(grads) for x in inputs), None, None, None, None, None)


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    return _differentiate(ctx, grad_out, grad_lse, _attention_backward)


_attention.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same two steps for eager callers: a custom op's dispatch costs a quarter of a millisecond a call, which is a quarter
    of the whole operator at 4,096 tokens. What was checked in the forward pass is not checked again in the backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, depth_k, depth_v, q_depth, cu_seqlens, causal, scale, depth_chunk, backend = arguments
        p = make_problem(
            q, k, v, depth_k, depth_v, q_depth=q_depth, causal=causal, scale=scale, depth_chunk=depth_chunk,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        solver = get_backend(backend, p)
        out, lse = solver.forward(p, q, k, v, depth_k, depth_v, q_depth)
        ctx.save_for_backward(q, k, v, depth_k, depth_v, q_depth, out, lse)
        ctx.p, ctx.solver = p, solver
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, depth_k, depth_v, q_depth, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        inputs = (q, k, v, depth_k, depth_v, q_depth)
        grads = iter(_solve_backward(ctx.p, ctx.solver, grad_out, grad_lse, *inputs, out, lse))
        return (*(None if x is None else next(grads) for x in inputs), None, None, None, None, None)


#: Tensors that the eager path takes; subclasses (fake tensors, DTensor) go through the custom op.
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def moda_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None = None,
    depth_v: torch.Tensor | None = None,
    *,
    q_depth: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    depth_chunk: int = 1,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
    :param backend: ``reference``, ``fused``, ``split`` or ``auto``. An explicit backend runs or raises.
    :param return_lse: also return the natural-log log-sum-exp of every query's logits.

    :returns: ``[B, T, Hq, D]`` in q's dtype, and with ``return_lse`` also ``[B, Hq, T]`` in fp32.

    :raises ValueError: naming the argument, what was expected and what was given.
    """
    if not isinstance(q, torch.Tensor):
        raise ValueError(f"moda_attention: q must be a torch.Tensor, got {type(q).__name__}")
    arguments = (q, k, v, depth_k, depth_v, q_depth, cu_seqlens, causal, scale, depth_chunk, backend)
    if torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in arguments[:7]):
        out, lse = _attention(*arguments)
    else:
        out, lse = _Eager.apply(*arguments)  # type: ignore[misc]
    return (out, lse) if return_lse else out
