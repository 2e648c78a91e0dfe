"""Slots in fp8: rounding, every backend that reads them against the naive equation on the numbers they stand for, streams.

The naive equation knows nothing of fp8: it gets ``scale * code`` as numbers, and its gradients are those of these numbers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moda_kernels import ATTENTION, DepthLayout, DepthStream, depth_attention, depth_write
from moda_kernels.depth.masked import masked_attention
from moda_kernels.moda_attention import DepthGradients, Inputs, get_backend, make_problem
from moda_kernels.moda_attention.fp8 import dequantise, quantise
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.moda_attention.quantised import Quantised, quantise_to
from moda_kernels.moda_attention.tensors import Deferred
from moda_kernels.yardstick import FACTOR, FLOOR, relative_error, report, verdicts
from tests.kernels.layouts import LISTS, layout
from tests.kernels.test_deferred_flush import judge, plain, streamed, toy
from tests.kernels.test_depth_stream import gradients, make_weights, with_lists, with_stream
from tests.kernels.test_moda_attention import NAMES, Case, draw, options
from tests.plain_model import fp8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ("reference", "split")


# --- rounding ------------------------------------------------------------------------------------------------------------


def test_rounding() -> None:
    """The largest of a row is exact; others are off by at most half the distance of two e4m3, relative to scale and value."""
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 50)[:, None]
    codes, scale = quantise(x)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape and scale.shape == (50,)
    back = dequantise(codes, scale, torch.float64)
    assert ((back - x).abs() <= torch.maximum(2**-4 * x.abs(), 2**-10 * scale[:, None]) * (1 + 1e-6)).all()
    at = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, at), x.double().gather(1, at), rtol=1e-7, atol=0)
    assert codes.float().abs().amax(1).eq(448).all()
    again, same = quantise(dequantise(codes, scale, torch.float32))
    assert torch.equal(again.float(), codes.float()) and relative_error(same, scale) < 1e-7
    assert relative_error(back, x) > 0.01  # not exact by accident


def test_rows_that_are_zero_or_not_finite() -> None:
    x = torch.zeros(4, 8)
    x[1, 2], x[2, 3], x[3] = float("nan"), float("inf"), 1e-44
    back = dequantise(*quantise(x), torch.float32)
    assert not back[0].any() and back[1, 2].isnan() and back[2, 3].isnan() and torch.isfinite(back[3]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D, Hk", [(64, 8), (40, 3), (128, 1), (8, 2)])
def test_the_kernel_rounds_as_pytorch_does(D: int, Hk: int, dtype: torch.dtype) -> None:
    """To the bit, strided inputs and outliers included. (Triton's interpreter rounds to fp8 wrongly: no test on a CPU.)"""
    g = torch.Generator().manual_seed(D)
    wide = (torch.randn(3, 333, 2 * Hk, D, generator=g) * torch.logspace(-4, 4, 333)[None, :, None, None]).to(
        "cuda", dtype
    )
    k, v = wide[:, :, ::2], wide[:, :, 1::2]
    k[0, 0] = 0
    to = Quantised(*(torch.empty(k.shape, dtype=torch.float8_e4m3fn, device="cuda") for _ in range(2)),
                   *(torch.empty(k.shape[:-1], device="cuda") for _ in range(2)))  # fmt: skip
    quantise_to(k, v, to)
    for x, codes, scales in ((k, to.k, to.scale_k), (v, to.v, to.scale_v)):
        wanted, scale = quantise(x.cpu())
        assert torch.equal(codes.cpu().view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(scales.cpu(), scale)


# --- one call ------------------------------------------------------------------------------------------------------------

SMALL = [
    Case(T=11),
    Case(T=5, S=17, G=3, Hk=1, D=40, B=2),
    Case(T=1, S=1, G=8, Hk=1),
    Case(S=5, docs=(0, 5, 21), q_depth=True, lse_gradient=True),
    Case(T=5, S=5, sequence=False, G=1, Hk=4),
    Case(T=9, S=9, slots=(1, 3, 4, 8), q_depth=True),
    Case(T=9, S=4, inputs="large"),
    Case(T=7, S=4, G=1, dtype="fp32", sequence=False),
]
AT_SIZE = [
    dataclasses.replace(Case(dtype="bf16", D=64, T=257, G=8, S=17), **change)  # type: ignore[arg-type]
    for change in (
        dict(),
        dict(G=2, Hk=8, S=72),
        dict(G=2, Hk=8, S=72, slots=tuple(range(0, 72, 2))),
        dict(G=1, S=1),
        dict(G=3, Hk=2, D=80, B=3),
        dict(D=128, q_depth=True, lse_gradient=True),
        dict(docs=(0, 1, 64, 130, 257), S=5),
        dict(sequence=False, S=40, slots=(0, 3, 4, 5, 9, 11, 20, 21, 22, 38)),
        dict(inputs="large", S=71),
        dict(dtype="fp16", G=16, Hk=1),
    )
]


def read_fp8(backend: str, case: Case, device: str) -> None:
    """Output, LSE and every gradient, those of the slots stored into and added to buffers."""
    drawn, opts = draw(case, device), options(case, device)
    assert drawn["q"] is not None and drawn["depth_k"] is not None and drawn["grad_out"] is not None
    dtype = drawn["q"].dtype
    codes, scales = zip(*(quantise(drawn[n]) for n in ("depth_k", "depth_v")))  # type: ignore[arg-type]
    x = Inputs(*(drawn[n] for n in NAMES), *scales)._replace(depth_k=codes[0], depth_v=codes[1])  # type: ignore[arg-type]
    p = make_problem(x, **{**opts, "slots": None if case.slots is None else torch.tensor(case.slots)})
    assert p.quantised and p.kind.quantised
    b = get_backend(backend, p.kind)
    saved = b.forward(p, x)
    read = list(range(case.S) if case.slots is None else case.slots)
    fresh = (len(read) // 2, len(read))
    buffers = [torch.full(codes[0].shape, float("nan"), dtype=dtype, device=device) for _ in range(2)]
    for buffer in buffers:
        buffer[read[: fresh[0]]] = 0.0
    grads = b.backward(p, drawn["grad_out"], drawn["grad_lse"], x, saved, DepthGradients(buffers[0], buffers[1], fresh))
    if b.defers:
        pending = b.pending(1, case.S, x.q, case.Hk)
        again = b.backward(p, drawn["grad_out"], drawn["grad_lse"], x, saved, Deferred(pending, 0, 0))
        same = FACTOR * FLOOR[torch.bfloat16 if GPU else torch.float16]  # another order of the same sums
        assert relative_error(again.q, grads.q) < same
        flushed = [torch.empty_like(buffer) for buffer in buffers]
        pending.flush((0, 1), tuple(read), DepthGradients(flushed[0], flushed[1], (0, len(read))))
        for a, c in zip(flushed, buffers, strict=True):
            assert relative_error(a[read], c[read]) < same
    ours = {"out": saved.out, "lse": saved.lse, "dq": grads.q, "dk": grads.k, "dv": grads.v, "dq_depth": grads.q_depth}
    ours |= {"ddepth_k": buffers[0][read], "ddepth_v": buffers[1][read]}

    def naive(dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        depth = {n: dequantise(c, s, dtype) for n, c, s in zip(("depth_k", "depth_v"), codes, scales)}
        given = {n: t for n in NAMES if (t := drawn[n]) is not None}
        leaves = {n: depth.get(n, t).to(dtype).requires_grad_() for n, t in given.items()}
        out, lse = naive_attention(*(leaves.get(n) for n in NAMES[:-1]), q_depth=leaves.get("q_depth"), **opts)  # type: ignore[arg-type]
        outputs, seeds = [out], [drawn["grad_out"].to(dtype)]  # type: ignore[union-attr]
        if drawn["grad_lse"] is not None:
            outputs, seeds = [out, lse], [*seeds, drawn["grad_lse"].to(lse.dtype)]
        found = torch.autograd.grad(outputs, list(leaves.values()), seeds, allow_unused=True)
        by_name = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found)}
        of_slots = {f"d{n}": g[read] if n.startswith("depth") else g for n, g in by_name.items()}
        return {"out": out.detach(), "lse": lse.detach(), **of_slots}

    judged = verdicts(ours, naive(dtype), naive(torch.float64))
    assert all(v.passed for v in judged), f"{backend}, {case}\n{report(judged)}"


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small(backend: str, case: Case, poisoned: None) -> None:
    if backend == "split":
        pytest.importorskip("triton")
        if not GPU and case.docs:
            pytest.skip("no sequence kernel packs documents on a CPU")
    read_fp8(backend, case, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("case", AT_SIZE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_at_size(backend: str, case: Case, poisoned: None) -> None:
    read_fp8(backend, case, "cuda")


def test_the_reference_equals_autograd_in_fp64() -> None:
    case = Case(S=6, slots=(0, 2, 5), C=3, q_depth=True)
    x64 = {n: None if t is None else t.double() for n, t in draw(case, "cpu").items()}
    codes, scales = zip(*(quantise(x64[n]) for n in ("depth_k", "depth_v")))  # type: ignore[arg-type]
    x = Inputs(*(x64[n] for n in NAMES), *scales)._replace(depth_k=codes[0], depth_v=codes[1])  # type: ignore[arg-type]
    opts = options(case, "cpu")
    out = get_backend("reference", make_problem(x, depth_chunk=3, slots=(0, 2, 5)).kind).forward(
        make_problem(x, depth_chunk=3, slots=(0, 2, 5)), x
    )
    depth = [dequantise(c, s, torch.float64) for c, s in zip(codes, scales)]
    truth = naive_attention(x.q, x.k, x.v, depth[0], depth[1], q_depth=x.q_depth, **opts)
    assert relative_error(out.out, truth[0]) < 1e-14 and relative_error(out.lse, truth[1]) < 1e-14


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(scale_v=None), "scale_v must be given together with scale_k"),
        (dict(scale_k=torch.ones(3, 1, 6, 2).double()), "scale_k must be of dtype torch.float32, got torch.float64"),
        (dict(scale_k=torch.ones(3, 1, 6, 1)), r"scale_k must be of shape \[3, 1, 6, 2\], got \[3, 1, 6, 1\]"),
        (dict(depth_k=torch.ones(3, 1, 6, 2, 16)), "depth_k must be of dtype torch.float8_e4m3fn, got torch.float32"),
        (dict(scale_k=None, scale_v=None), "depth_k must be of q's dtype torch.float32, got torch.float8_e4m3fn"),
        (dict(depth_k=None, depth_v=None), "depth_k must be given together with scale_k"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    q, k = torch.ones(1, 6, 4, 16), torch.ones(1, 6, 2, 16)
    codes, scale = quantise(k.expand(3, -1, -1, -1, -1))
    with pytest.raises(ValueError, match=words):
        make_problem(Inputs(q, k, k, codes, codes, None, scale, scale)._replace(**change))


def test_backends_that_cannot_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    q = torch.zeros(1, 1, 1, 16, dtype=torch.float16)
    kind = make_problem(Inputs(q, q, q)).kind._replace(quantised=True)
    with pytest.raises(ValueError, match="'fused' cannot run this: depth_k: fused does not read fp8"):
        get_backend("fused", kind)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(ValueError, match="'split' cannot run this: depth_k: e4m3 needs compute capability 8.9 .* 8.6"):
        get_backend("split", kind._replace(device=torch.device("cuda", 0)))


# --- streams --------------------------------------------------------------------------------------------------------------


def in_fp8(case: DepthLayout) -> DepthLayout:
    return dataclasses.replace(case, quantised=True)


LAYOUTS = {"all": layout(4), "window": layout(4, window=3), **{n: layout(5, choose=c) for n, c in LISTS.items()}}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_autograd_through_rounded_slots(name: str) -> None:
    """In fp64; evaluation uses rows again."""
    case = in_fp8(LAYOUTS[name])
    weights = make_weights(case.n_layers)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *(w for layer in weights for w in layer)]
    ours, truth = with_stream(x, weights, case), with_lists(x, weights, case, kept=fp8)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    for a, b in zip(gradients(ours, leaves), gradients(truth, leaves)):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(with_stream(x, weights, case), truth, rtol=0, atol=1e-13)
    assert relative_error(truth, with_lists(x, weights, case)) > 1e-4  # the rounding is there


def rerun(*args: Any) -> Any:
    return checkpoint(*args, use_reentrant=False)


@pytest.mark.parametrize(
    "name, defer, wrap",
    [("all", 1, rerun), ("window", 3, rerun), ("every-second", 3, None)],
    ids=["all-checkpointed", "window-deferred-checkpointed", "every-second-deferred"],
)
def test_split_streams(name: str, defer: int, wrap: Any, poisoned: None) -> None:
    pytest.importorskip("triton")
    case, (x, weights) = in_fp8(LAYOUTS[name]), toy(LAYOUTS[name].n_layers)
    judge(
        lambda x, w: streamed(x, w, DepthStream(case, "split", defer=defer), 1, 16, wrap),
        lambda x, w: plain(x, w, case, 1, 16, kept=fp8),
        x,
        weights,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("defer", [1, 8])
@pytest.mark.parametrize("pattern", ["all", *LISTS])
def test_streams_at_size(pattern: str, defer: int) -> None:
    case = in_fp8(layout(12, choose=LISTS.get(pattern, tuple)))
    x, weights = toy(12, T=260, hk=4, group=2, d=64)
    judge(
        lambda x, w: streamed(x, w, DepthStream(case, "split", defer=defer), 4, 64),
        lambda x, w: plain(x, w, case, 4, 64, kept=fp8),
        x,
        weights,
    )


def test_reading_under_a_mask() -> None:
    """What scores continuations: the same as the causal mask where the mask is causal."""
    case = in_fp8(layout(2, kinds=1))
    with torch.no_grad():
        stream = DepthStream(case, "reference")
        order = stream.start()
        q, k, v = (torch.randn(2, 6, h, 8) for h in (4, 2, 2))
        order = depth_write(order, k, v, stream.layer_rows[0], ATTENTION)
        mask = torch.ones(6, 6).tril().bool().expand(2, -1, -1)
        row = stream.layer_rows[1]
        wanted, _ = depth_attention(q, k, v, order, row)
        got, _ = depth_attention(q, k, v, order, row, mask=mask)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert relative_error(got, masked_attention(q, k, v, mask)[0]) > 0.01
