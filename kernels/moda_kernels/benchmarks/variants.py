"""Who is measured. A variant binds one case's tensors and then offers its forward and backward as plain launches.

Timed below autograd: what one call of the operator launches and allocates, the functional form's S gradient tensors included,
without the host's bookkeeping of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moda_kernels.moda_attention import DepthGradients, Inputs, Problem, Result, get_backend, make_problem

from .cases import Case

__all__ = ["VARIANTS", "Bound", "Variant", "bind", "problem_of"]

Tensors = dict[str, torch.Tensor | None]
INPUTS = ("q", "k", "v", "depth_k", "depth_v")


@dataclass(frozen=True)
class Variant:
    """:param exact: what runs, named exactly. :param depth: whether it computes the depth part (baselines do not)."""

    name: str
    exact: str
    depth: bool
    backend: str | None = None
    sequence_kernel: str | None = None
    longest: int = 1 << 30


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("cudnn", "aten._scaled_dot_product_cudnn_attention, sequence only", False, sequence_kernel="cudnn"),
        Variant("flash", "aten._flash_attention_forward (FlashAttention 2)", False, sequence_kernel="flash"),
        Variant("triton", "this project's fused kernels without depth slots", False, backend="fused"),
        Variant(
            "reference", "backend reference: vectorised PyTorch, fp32 inside", True, backend="reference", longest=4096
        ),
        Variant("fused", "backend fused", True, backend="fused"),
        Variant("split", "backend split", True, backend="split"),
    )
}


class NotRun(Exception):
    """A variant that is not asked to run a case; the reason goes into the CSV."""


@dataclass
class Bound:
    """A variant on a case's tensors. ``results`` after a forward and a backward, by the yardstick's names."""

    problem: Problem
    forward: Callable[[], Result]
    backward: Callable[[Result], dict[str, torch.Tensor | None]]
    backward_add: Callable[[Result], None] | None = None


def inputs_of(x: Tensors, depth: bool) -> Inputs:
    assert x["q"] is not None
    return Inputs(x["q"], x["k"], x["v"], *((x["depth_k"], x["depth_v"]) if depth else ()))


def problem_of(case: Case, x: Tensors, depth: bool) -> Problem:
    return make_problem(
        inputs_of(x, depth), causal=case.causal, depth_chunk=case.depth_chunk, cu_seqlens=x["cu_seqlens"]
    )


def bind(variant: Variant, case: Case, x: Tensors) -> Bound:
    """Attach a variant to tensors.

    :raises NotRun: with the reason, where the variant is not asked to run the case.
    :raises ValueError: where it cannot.
    """
    if case.T > variant.longest:
        raise NotRun(f"T > {variant.longest}: takes too long")
    if not variant.depth and not case.sequence:
        raise NotRun("depth-only: there is no sequence attention")
    p = problem_of(case, x, variant.depth)
    if variant.sequence_kernel is not None:
        return _bind_sequence(variant.sequence_kernel, p, x)
    assert variant.backend is not None
    backend = get_backend(variant.backend, p.kind)
    inputs, grad_out = inputs_of(x, variant.depth), x["grad_out"]
    assert grad_out is not None
    depth_k, depth_v = inputs.depth_k, inputs.depth_v

    def forward() -> Result:
        return backend.forward(p, inputs)

    def backward(saved: Result) -> dict[str, torch.Tensor | None]:
        depth = None
        if depth_k is not None and depth_v is not None:
            depth = DepthGradients(torch.empty_like(depth_k), torch.empty_like(depth_v), (0, p.n_slots))
        dq, dk, dv, _ = backend.backward(p, grad_out, None, inputs, saved, depth)
        gk, gv = (None, None) if depth is None else (depth.k, depth.v)
        return {"dq": dq, "dk": dk, "dv": dv, "ddepth_k": gk, "ddepth_v": gv}

    sums: list[torch.Tensor] = []

    def backward_add(saved: Result) -> None:
        """Depth gradients added to buffers that stay, as a layer's backward inside a model does."""
        if not sums:
            sums.extend(torch.zeros_like(t) for t in (depth_k, depth_v) if t is not None)
        backend.backward(p, grad_out, None, inputs, saved, DepthGradients(sums[0], sums[1], (0, 0)))

    return Bound(p, forward, backward, backward_add if depth_k is not None else None)


def _bind_sequence(name: str, p: Problem, x: Tensors) -> Bound:
    from moda_kernels.moda_attention.split import sequence

    kernel = sequence.choose(p.kind._replace(sequence_kernel=name))
    q, k, v, grad_out = (x[n] for n in ("q", "k", "v", "grad_out"))
    assert q is not None and k is not None and v is not None and grad_out is not None

    def backward(saved: Result) -> dict[str, torch.Tensor | None]:
        dq, dk, dv = kernel.backward(p, grad_out, q, k, v, *saved)
        return {"dq": dq, "dk": dk, "dv": dv}

    return Bound(p, lambda: Result(*kernel.forward(p, q, k, v)), backward)
