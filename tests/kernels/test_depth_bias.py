"""A bias per depth slot: every backend that adds it against the naive equation, with its gradient, and through streams."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moda_kernels import ATTENTION, FFN, DepthLayout, DepthStream, depth_attention, depth_write, slot_attention
from moda_kernels.moda_attention import Deferred, DepthGradients, Inputs, get_backend, make_problem
from moda_kernels.moda_attention.fp8 import dequantise, quantise
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.yardstick import report, verdicts
from tests.kernels.layouts import LISTS, layout
from tests.kernels.test_depth_stream import HQ, D, heads, make_weights
from tests.kernels.test_moda_attention import NAMES, Case, draw, options

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

SMALL = [
    Case(T=11),
    Case(T=5, S=17, G=3, Hk=1, D=40, B=2),
    Case(T=3, S=1, G=8, Hk=1),
    Case(T=9, S=9, slots=(1, 3, 4, 8), q_depth=True, lse_gradient=True),
    Case(T=5, S=5, sequence=False, G=1, Hk=4),
    Case(T=9, S=4, inputs="large"),
    Case(T=3, S=3, G=17, Hk=1),
]
AT_SIZE = [
    dataclasses.replace(Case(dtype="bf16", D=64, T=257, G=8, S=17), **change)  # type: ignore[arg-type]
    for change in (
        dict(),
        dict(G=2, Hk=8, S=46, B=2),
        dict(G=2, Hk=8, S=72, slots=tuple(range(0, 72, 2))),
        dict(D=128, q_depth=True, lse_gradient=True),
        dict(docs=(0, 1, 64, 130, 257), S=5),
        dict(sequence=False, S=40, slots=(0, 3, 4, 5, 9, 11, 20, 21, 22, 38)),
        dict(dtype="fp16", G=16, Hk=1),
    )
]


def biased(backend: str, case: Case, device: str, fp8: bool) -> None:
    """Output, LSE and every gradient, that of the bias too; a backend that can defers those of the slots as well."""
    drawn, opts = draw(case, device), options(case, device)
    read = list(range(case.S) if case.slots is None else case.slots)
    bias = (3 * torch.randn(len(read), generator=torch.Generator().manual_seed(case.S))).to(device)
    assert drawn["q"] is not None and drawn["depth_k"] is not None and drawn["grad_out"] is not None
    dtype = drawn["q"].dtype
    given: dict[str, Any] = {n: drawn[n] for n in NAMES}
    slots = {n: drawn[n] for n in ("depth_k", "depth_v")}
    if fp8:
        for name in ("k", "v"):
            given[f"depth_{name}"], given[f"scale_{name}"] = quantise(drawn[f"depth_{name}"])  # type: ignore[arg-type]
    x = Inputs(**given, depth_bias=bias)
    p = make_problem(x, **{**opts, "slots": None if case.slots is None else torch.tensor(case.slots)})
    b = get_backend(backend, p.kind)
    saved = b.forward(p, x)
    buffers = [torch.full(drawn["depth_k"].shape, float("nan"), dtype=dtype, device=device) for _ in range(2)]
    grads = b.backward(
        p, drawn["grad_out"], drawn["grad_lse"], x, saved, DepthGradients(buffers[0], buffers[1], (0, len(read)))
    )
    if b.defers:
        again = b.backward(
            p, drawn["grad_out"], drawn["grad_lse"], x, saved, Deferred(b.pending(1, case.S, x.q, case.Hk), 0, 0)
        )
        assert grads.depth_bias is not None and again.depth_bias is not None
        assert torch.equal(again.depth_bias, grads.depth_bias)
    ours = {"out": saved.out, "lse": saved.lse, "dbias": grads.depth_bias}
    ours |= {"dq": grads.q, "dk": grads.k, "dv": grads.v, "dq_depth": grads.q_depth}
    ours |= {"ddepth_k": buffers[0][read], "ddepth_v": buffers[1][read]}

    def naive(dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        kept = {n: dequantise(given[n], given[n.replace("depth", "scale")], dtype) if fp8 else slots[n] for n in slots}
        present = {n: kept.get(n, t) for n, t in drawn.items() if n in NAMES and t is not None}
        leaves = {n: t.to(dtype).requires_grad_() for n, t in present.items()}  # type: ignore[union-attr]
        leaves["bias"] = bias.to(dtype).requires_grad_()
        out, lse = naive_attention(
            *(leaves.get(n) for n in NAMES[:-1]), q_depth=leaves.get("q_depth"), depth_bias=leaves["bias"], **opts
        )  # type: ignore[arg-type]
        outputs, seeds = [out], [drawn["grad_out"].to(dtype)]  # type: ignore[union-attr]
        if drawn["grad_lse"] is not None:
            outputs, seeds = [out, lse], [*seeds, drawn["grad_lse"].to(lse.dtype)]
        found = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), seeds)))
        of_slots = {f"d{n}": g[read] if n.startswith("depth") else g for n, g in found.items()}
        return {"out": out.detach(), "lse": lse.detach(), **of_slots}

    judged = verdicts(ours, naive(dtype), naive(torch.float64))
    assert all(v.passed for v in judged), f"{backend}, {case}\n{report(judged)}"


@pytest.mark.parametrize("fp8", [False, True], ids=["as-drawn", "fp8"])
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend", ["reference", "split"])
def test_small(backend: str, case: Case, fp8: bool, poisoned: None) -> None:
    if backend == "split":
        pytest.importorskip("triton")
    biased(backend, case, DEVICE, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["as-drawn", "fp8"])
@pytest.mark.parametrize("case", AT_SIZE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "split"])
def test_at_size(backend: str, case: Case, fp8: bool, poisoned: None) -> None:
    biased(backend, case, "cuda", fp8)


def test_bad_input() -> None:
    q, k = torch.ones(1, 6, 4, 16), torch.ones(3, 1, 6, 2, 16)
    for bias, words in (
        (torch.ones(2), r"depth_bias must be of shape \[3\], got \[2\]"),
        (torch.ones(3).half(), "depth_bias must be of dtype torch.float32, got torch.float16"),
        ([0.0] * 3, "depth_bias must be a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=words):
            make_problem(Inputs(q, k[0], k[0], k, k, depth_bias=bias))  # type: ignore[arg-type]
    pytest.importorskip("triton")
    kind = make_problem(Inputs(q, k[0], k[0], k, k, depth_bias=torch.ones(3))).kind
    with pytest.raises(ValueError, match="'fused' cannot run this: depth_bias: fused adds none"):
        get_backend("fused", kind)


# --- streams --------------------------------------------------------------------------------------------------------------

LAYOUTS = {"all": layout(4), "window": layout(5, window=3), "scattered": layout(5, choose=LISTS["scattered"])}


def streamed(
    x: torch.Tensor, weights: Any, biases: list[torch.Tensor], stream: DepthStream, apart: bool, again: bool, mask: Any
) -> torch.Tensor:
    """The toy model of ``test_depth_stream.py`` with a bias per reading layer, longer than what the layer reads."""
    case, order = stream.layout, stream.start(x.device)

    def run(x: torch.Tensor, order: torch.Tensor, bias: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        wq, wk, wv, wfk, wfv = weights[layer]
        q, k, v = heads(x, wq), heads(x, wk), heads(x, wv)
        row = stream.layer_rows[layer]
        if apart:
            out, order = slot_attention(q, order, row, depth_bias=bias)
        else:
            out, order = depth_attention(q, k, v, order, row, depth_bias=bias, mask=mask)
        if case.written_slot(layer, ATTENTION) is not None:
            order = depth_write(order, k, v, row, ATTENTION)
        x = x + out.flatten(2).tanh()
        if case.written_slot(layer, FFN) is not None:
            order = depth_write(order, heads(x, wfk), heads(x, wfv), row, FFN)
        return x, order

    for layer, bias in enumerate(biases):
        x, order = checkpoint(run, x, order, bias, layer, use_reentrant=False) if again else run(x, order, bias, layer)
    return x


def listed(x: torch.Tensor, weights: Any, biases: list[torch.Tensor], case: DepthLayout, apart: bool) -> torch.Tensor:
    candidates: list[tuple[torch.Tensor, torch.Tensor]] = []
    for read, (wq, wk, wv, wfk, wfv), bias in zip(case.reads, weights, biases):
        q, k, v = heads(x, wq), heads(x, wk), heads(x, wv)
        dk, dv = (torch.stack([candidates[c][i] for c in read]) if read else None for i in (0, 1))
        if read or not apart:
            keys = (None, None) if apart else (k, v)
            out, _ = naive_attention(q, *keys, dk, dv, depth_bias=bias[: len(read)])
            x = x + out.flatten(2).tanh()
        candidates.extend([(k, v), (heads(x, wfk), heads(x, wfv))][: case.kinds])
    return x


@pytest.mark.parametrize("apart", [False, True], ids=["joint", "apart"])
@pytest.mark.parametrize("again", [False, True], ids=["once", "checkpointed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_streams(name: str, again: bool, apart: bool) -> None:
    """In fp64 with all gradients; and evaluation, which uses rows again in another order, with a causal mask too."""
    case = LAYOUTS[name]
    weights = make_weights(case.n_layers)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, HQ * D, dtype=torch.float64, generator=g).requires_grad_()
    biases = list(torch.randn(case.n_layers, case.n_slots + 1, dtype=torch.float64, generator=g).requires_grad_())
    leaves = [x, *biases, *(w for layer in weights for w in layer)]
    ours = streamed(x, weights, biases, DepthStream(case, "reference"), apart, again, None)
    truth = listed(x, weights, biases, case, apart)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    found, wanted = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (ours, truth))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None or not a.any()) if b is None else a is not None and torch.allclose(a, b, rtol=0, atol=1e-12)
    assert all(
        b is not None and b.any() for b in wanted[2 : 1 + case.n_layers]
    )  # the biases of all but the first layer
    mask = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    for given in (None, mask):
        with torch.no_grad():
            evaluated = streamed(x, weights, biases, DepthStream(case, "reference"), apart, False, given)
        torch.testing.assert_close(evaluated, truth, rtol=0, atol=1e-13)
