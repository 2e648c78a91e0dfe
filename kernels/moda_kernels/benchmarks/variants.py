"""Who is measured. A variant binds one case's tensors and then offers its forward and backward as plain launches.

Timed below autograd: what one call of the operator launches and allocates, the functional form's S gradient tensors included,
without the host's bookkeeping of a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moda_kernels.moda_attention.backend import get_backend
from moda_kernels.moda_attention.problem import Problem, make_problem
from moda_kernels.moda_attention.tensors import DepthGradients, Inputs, Result

from .cases import Case

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
        Variant(
            "flash_attn_4", "flash_attn.cute (FlashAttention 4), sequence only", False, sequence_kernel="flash_attn_4"
        ),
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

    exact: str  # what runs, the sequence kernel of split included
    problem: Problem
    forward: Callable[[], Result]
    backward: Callable[[Result], dict[str, torch.Tensor | None]]
    backward_add: Callable[[Result], None] | None = None


def bind(variant: Variant, case: Case, x: Tensors) -> Bound:
    """Attach a variant to tensors.

    :raises NotRun: with the reason, where the variant is not asked to run the case.
    :raises ValueError: where it cannot.
    """
    if case.T > variant.longest:
        raise NotRun(f"T > {variant.longest}: takes too long")
    if not variant.depth and not case.sequence:
        raise NotRun("depth-only: there is no sequence attention")
    q, grad_out = x["q"], x["grad_out"]
    assert q is not None and grad_out is not None
    inputs = Inputs(q, x["k"], x["v"], *((x["depth_k"], x["depth_v"]) if variant.depth else ()))
    if case.fp8 and variant.depth:
        inputs = inputs._replace(scale_k=x["scale_k"], scale_v=x["scale_v"])
    options = dict(causal=case.causal, depth_chunk=case.depth_chunk, cu_seqlens=x["cu_seqlens"])
    slots = case.slots if variant.depth else None
    p = make_problem(inputs, slots=slots, **options)  # type: ignore[arg-type]
    if variant.sequence_kernel is not None:
        return _bind_sequence(variant, p, inputs, grad_out)
    assert variant.backend is not None
    backend = get_backend(variant.backend, p.kind)
    exact = variant.exact
    if variant.backend == "split" and case.sequence:
        from moda_kernels.moda_attention.split import sequence

        exact += f", sequence kernel {sequence.choose(p.kind).describe()}"
    sums: list[torch.Tensor] = []

    def backward(saved: Result) -> dict[str, torch.Tensor | None]:
        depth = None
        if inputs.depth_k is not None and inputs.depth_v is not None:
            buffers = (torch.empty_like(inputs.depth_k, dtype=q.dtype), torch.empty_like(inputs.depth_v, dtype=q.dtype))
            depth = DepthGradients(*buffers, (0, p.n_slots))
        g = backend.backward(p, grad_out, None, inputs, saved, depth)
        dk, dv = (None, None) if depth is None else (t[:: case.every] for t in depth[:2])
        return {"dq": g.q, "dk": g.k, "dv": g.v, "ddepth_k": dk, "ddepth_v": dv}

    def backward_add(saved: Result) -> None:
        """Depth gradients added to buffers that stay, as a layer's backward inside a model does."""
        if not sums:
            sums.extend(torch.zeros_like(t, dtype=q.dtype) for t in (inputs.depth_k, inputs.depth_v) if t is not None)
        backend.backward(p, grad_out, None, inputs, saved, DepthGradients(sums[0], sums[1], (0, 0)))

    return Bound(exact, p, lambda: backend.forward(p, inputs), backward, backward_add if p.n_slots else None)


def _bind_sequence(variant: Variant, p: Problem, x: Inputs, grad_out: torch.Tensor) -> Bound:
    from moda_kernels.moda_attention.split import sequence

    kernel = sequence.choose(p.kind._replace(sequence_kernel=variant.sequence_kernel))
    k, v = x.k, x.v
    assert k is not None and v is not None

    def backward(saved: Result) -> dict[str, torch.Tensor | None]:
        dq, dk, dv = kernel.backward(p, grad_out, x.q, k, v, *saved)
        return {"dq": dq, "dk": dk, "dv": dv}

    return Bound(variant.exact, p, lambda: Result(*kernel.forward(p, x.q, k, v)), backward)
