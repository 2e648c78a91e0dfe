"""The operator against the yardstick, every backend, every gradient.

On a CPU the Triton backends run in the interpreter on tiny shapes (fp16 and fp32: its bf16 product is not trustworthy). The full
grid needs a GPU: ``pytest -m gpu tests/kernels``.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from moda_kernels.moda_attention import DepthGradients, Inputs, get_backend, make_problem, moda_attention
from moda_kernels.moda_attention.backend import choose_backend
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.moda_attention.problem import Kind, as_run
from moda_kernels.yardstick import compare, relative_error, report, verdicts

GPU = torch.cuda.is_available()
BACKENDS = ("reference", "fused", "split")
NAMES = ("q", "k", "v", "depth_k", "depth_v", "q_depth")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One problem; fields as in the legend (B, T, Hq, Hk, D, S), C the depth chunk, ``slots`` those that are read."""

    T: int = 21
    G: int = 2
    S: int = 3
    D: int = 32
    Hk: int = 2
    B: int = 1
    dtype: str = "fp16"
    causal: bool = True
    C: int = 1
    docs: tuple[int, ...] = ()
    sequence: bool = True
    q_depth: bool = False
    inputs: str = "normal"
    lse_gradient: bool = False
    strided: bool = False
    slots: tuple[int, ...] | None = None

    def __str__(self) -> str:
        default = Case()
        parts = [f"T{self.T}", f"G{self.G}", f"S{self.S}", f"D{self.D}", self.dtype]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("T", "G", "S", "D", "dtype") or value == getattr(default, f.name):
                continue
            named = {"causal": "non-causal", "sequence": "depth-only", "docs": f"{len(self.docs) - 1}docs"}
            named["slots"] = f"slots{len(self.slots or ())}-{'.'.join(map(str, (self.slots or ())[:6]))}"
            parts.append(named.get(f.name) or (f.name if value is True else f"{f.name}{value}"))
        return "-".join(parts)


def draw(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    """Inputs and output gradients in the case's dtype; absent ones are None."""
    g = torch.Generator().manual_seed(1000 * case.T + 10 * case.S + case.G)
    B, T, Hq, Hk, D, S = case.B, case.T, case.G * case.Hk, case.Hk, case.D, case.S
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, factor: float = 1.0) -> torch.Tensor:
        x = (torch.randn(*shape, generator=g) * factor).to(dtype)
        if case.strided:  # every other element of a larger tensor in the head dimension's neighbour
            wide = torch.full((*shape[:-2], 2 * shape[-2], shape[-1]), float("nan"), dtype=dtype)
            wide[..., ::2, :] = x
            return wide.to(device)[..., ::2, :]
        return x.to(device)

    # 'large': rows whose biggest logit is near +-50; 'identical': all keys of a head the same, so probabilities tie.
    factor = 3.0 if case.inputs == "large" else 1.0
    x: dict[str, torch.Tensor | None] = {n: None for n in NAMES}
    x["q"] = normal(B, T, Hq, D, factor=factor)
    if case.sequence:
        x["k"], x["v"] = normal(B, T, Hk, D, factor=factor), normal(B, T, Hk, D)
    if S:
        x["depth_k"], x["depth_v"] = normal(S, B, T, Hk, D, factor=factor), normal(S, B, T, Hk, D)
        if case.q_depth:
            x["q_depth"] = normal(B, T, Hq, D, factor=factor)
    if case.inputs == "identical":
        for name in ("k", "depth_k"):
            if x[name] is not None:
                x[name] = torch.ones_like(x[name]) * x[name].flatten(0, -3)[0]
    x["grad_out"] = normal(B, T, Hq, D)
    x["grad_lse"] = torch.randn(B, Hq, T, generator=g).to(device) if case.lse_gradient else None
    return x


def options(case: Case, device: str) -> dict[str, Any]:
    cu = torch.tensor(case.docs, dtype=torch.int32, device=device) if case.docs else None
    return dict(causal=case.causal, depth_chunk=case.C, cu_seqlens=cu, slots=case.slots)


def differentiate(
    run, x: dict[str, torch.Tensor | None], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor | None]:
    """Output, LSE and gradients by autograd, on the inputs cast to ``dtype``."""

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or dtype is None else t.to(dtype)

    leaves = {n: None if x[n] is None else cast(x[n]).detach().requires_grad_() for n in NAMES}
    out, lse = run(*(leaves[n] for n in NAMES[:-1]), q_depth=leaves["q_depth"])
    outputs, grads = [out], [cast(x["grad_out"])]
    if x["grad_lse"] is not None:
        outputs.append(lse)
        grads.append(x["grad_lse"].to(lse.dtype))
    present = [n for n in NAMES if leaves[n] is not None]
    found = torch.autograd.grad(outputs, [leaves[n] for n in present], grads, allow_unused=True)
    by_name = {n: g if g is not None else torch.zeros_like(leaves[n]) for n, g in zip(present, found)}
    return {"out": out.detach(), "lse": lse.detach(), **{f"d{n}": by_name.get(n) for n in NAMES}}


def skip_unless_supported(name: str, case: Case, x: dict[str, torch.Tensor | None], device: str) -> None:
    """fused (but for fp32 on a GPU) and reference must take every case; split may refuse by name, and the reason is shown."""
    p = make_problem(Inputs(*(x[n] for n in NAMES)), **options(case, device))
    try:
        get_backend(name, p.kind)
    except ValueError as error:
        if name == "split" or (name == "fused" and case.dtype == "fp32" and device == "cuda"):
            pytest.skip(str(error))
        raise


def judge(name: str, case: Case, device: str) -> None:
    x = draw(case, device)
    skip_unless_supported(name, case, x, device)
    opts = options(case, device)

    def operator(*t, q_depth):
        return moda_attention(*t, q_depth=q_depth, backend=name, return_lse=True, **opts)

    def naive(*t, q_depth):
        return naive_attention(*t, q_depth=q_depth, **opts)

    judged = verdicts(differentiate(operator, x), differentiate(naive, x), differentiate(naive, x, torch.float64))
    assert all(v.passed for v in judged), f"{name}, {case}\n{report(judged)}"


# --- small cases: the interpreter on a CPU, all backends on a GPU ----------------------------------------------------

SMALL = [
    Case(),
    Case(S=0, G=1),
    Case(T=1, S=1, G=8, Hk=1),
    Case(T=35, S=17, G=3, Hk=1, D=40, B=2),
    Case(S=2, causal=False, T=37),
    Case(docs=(0, 5, 21), S=2),
    Case(docs=(0, 3, 21), causal=False, S=2),
    Case(sequence=False, S=5),
    Case(C=4, S=2),
    Case(C=3, docs=(0, 7, 21), q_depth=True, S=2),
    Case(sequence=False, C=5, q_depth=True, S=2),
    Case(q_depth=True, lse_gradient=True),
    Case(inputs="large", S=4),
    Case(inputs="identical", S=4),
    Case(strided=True, D=40),
    Case(dtype="fp32", S=4, G=1),
    Case(S=9, slots=(0, 2, 4, 6, 8)),
    Case(S=9, slots=(1, 3, 4, 8), q_depth=True, lse_gradient=True, G=3, Hk=1),
    Case(S=5, slots=(0, 1, 3, 4), docs=(0, 5, 21)),
    Case(S=4, slots=(0, 3), C=4, q_depth=True),
    Case(S=6, slots=(0, 2, 3, 5), sequence=False, G=1, Hk=4),
    Case(S=5, slots=(1, 2, 3)),
    Case(S=3, slots=()),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small(backend: str, case: Case, poisoned: None) -> None:
    judge(backend, case, "cuda" if GPU else "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_output_gradient(backend: str) -> None:
    """``out.sum().backward()`` hands back a gradient whose strides are all zero."""
    device = "cuda" if GPU else "cpu"
    x = draw(Case(S=2), device)
    skip_unless_supported(backend, Case(S=2), x, device)
    leaves = [x[n].clone().requires_grad_() for n in NAMES[:-1]]
    out = moda_attention(*leaves, backend=backend)
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    rows = torch.ones(x["q"].shape[-1], dtype=out.dtype, device=device).expand_as(out)
    for gradient in (torch.ones_like(out), rows):
        for a, b in zip(expanded, torch.autograd.grad(out, leaves, gradient, retain_graph=True)):
            assert relative_error(a, b) < 1e-3


# --- the full grid -----------------------------------------------------------------------------------------------------


def grid() -> list[Case]:
    bf16 = Case(dtype="bf16", D=64)
    cases = [
        dataclasses.replace(bf16, T=333 if S != 140 else 127, S=S, G=G)
        for S in (0, 1, 17, 71, 140)
        for G in (1, 2, 3, 8)
    ]
    cases += [Case(T=201, S=17, G=2, D=D, dtype=t) for D in (64, 80, 128) for t in ("bf16", "fp16", "fp32")]
    cases += [dataclasses.replace(bf16, T=T, S=5, G=8, Hk=1) for T in (1, 2, 63, 64, 65, 513)]
    cases += [dataclasses.replace(bf16, T=97, S=9, G=G, Hk=1) for G in (16, 32)]
    base = dataclasses.replace(bf16, T=257, S=17, G=8)
    docs = (0, 1, 64, 130, 257)
    switches: list[dict[str, object]] = [
        dict(causal=False),
        dict(causal=False, G=1, D=128, S=3),
        dict(docs=docs),
        dict(docs=docs, causal=False, G=2),
        dict(docs=docs, G=1, D=128, S=0),
        dict(sequence=False),
        dict(sequence=False, D=128, G=2, q_depth=True),
        dict(C=2, G=2),
        dict(C=5, S=4),
        dict(C=64, S=3, G=2),
        dict(C=300, S=2),
        dict(C=7, S=4, docs=docs, q_depth=True),
        dict(C=16, S=4, sequence=False, G=2),
        dict(C=4, S=4, causal=False, D=80),
        dict(B=3),
        dict(B=3, q_depth=True, lse_gradient=True, G=2),
        dict(q_depth=True, D=128, S=71),
        dict(inputs="large", S=71),
        dict(inputs="large", sequence=False, S=71),
        dict(inputs="identical", S=71),
        dict(strided=True),
        dict(strided=True, D=80, B=2, C=3, S=4),
        dict(S=71, slots=tuple(range(0, 71, 2))),
        dict(S=71, slots=tuple(range(0, 71, 2)), G=2, B=2, q_depth=True, lse_gradient=True),
        dict(S=40, slots=(0, 3, 4, 5, 9, 11, 20, 21, 22, 38), D=128, G=2),
        dict(S=33, slots=tuple(i for i in range(33) if i != 7), G=1),
        dict(S=71, slots=(0, 70), causal=False),
        dict(S=20, slots=(1, 5, 6, 19), sequence=False),
        dict(S=9, slots=(0, 4, 5, 8), C=5, docs=docs),
        dict(S=30, slots=tuple(range(4, 25))),
    ]
    return cases + [dataclasses.replace(base, **s) for s in switches]


@pytest.mark.gpu
@pytest.mark.parametrize("case", grid(), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grid(backend: str, case: Case, poisoned: None) -> None:
    judge(backend, case, "cuda")


def test_reference_equals_plain_autograd_in_fp64() -> None:
    """The truth itself: explicit gradients of the reference against autograd on dense logits, both fp64."""
    cases = [Case(S=4), Case(causal=False), Case(docs=(0, 5, 21), C=3, q_depth=True), Case(sequence=False, C=4)]
    cases += [Case(S=6, slots=(0, 2, 5)), Case(S=6, slots=(1, 2, 4), C=3, q_depth=True), Case(S=6, slots=(2, 3, 4))]
    for case in [dataclasses.replace(c, lse_gradient=True) for c in cases]:
        x, opts = draw(case, "cpu"), options(case, "cpu")
        ours = differentiate(
            lambda *t, q_depth, o=opts: moda_attention(*t, q_depth=q_depth, backend="reference", return_lse=True, **o),
            x, torch.float64,
        )  # fmt: skip
        plain = differentiate(lambda *t, q_depth, o=opts: naive_attention(*t, q_depth=q_depth, **o), x, torch.float64)
        for name, value in plain.items():
            if value is not None:
                assert relative_error(ours[name], value) < 1e-13, (str(case), name)


# --- depth gradients: store and add --------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", (1, 3), ids=("own", "chunk3"))
@pytest.mark.parametrize("slots", (None, (0, 2, 3, 6)), ids=("run", "list"))
@pytest.mark.parametrize("fresh", ((0, 4), (2, 4), (1, 3), (0, 0)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_slots_are_stored_and_others_added(
    backend: str, fresh: tuple[int, int], slots: tuple[int, ...] | None, C: int
) -> None:
    """Four slots of seven are read, the first or a list; fresh ones hold NaN before, the others values that must stay in the
    sum."""
    device = "cuda" if GPU else "cpu"
    case = Case(S=4 if slots is None else 7, T=19, C=C, slots=slots)
    read = list(slots or range(4))
    drawn = draw(case, device)
    skip_unless_supported(backend, case, drawn, device)

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        x = Inputs(*(None if drawn[n] is None else drawn[n].to(dtype) for n in NAMES))
        p = make_problem(x, **options(case, device))
        b = get_backend(name, p.kind)
        buffers = []
        for i in (1.0, 2.0):
            buffer = torch.full((7, *x.depth_k.shape[1:]), float("nan"), device=device, dtype=dtype)
            buffer[read[: fresh[0]]] = i
            buffer[read[fresh[1] :]] = -i
            buffers.append(buffer)
        saved = b.forward(p, x)
        views = buffers if slots is not None else [buffer[:4] for buffer in buffers]
        b.backward(p, drawn["grad_out"].to(dtype), None, x, saved, DepthGradients(views[0], views[1], fresh))
        return buffers

    truth, plain = run("reference", torch.float64), run("reference", torch.float16)
    for name, ours, low, exact in zip(("ddepth_k", "ddepth_v"), run(backend, torch.float16), plain, truth):
        others = [i for i in range(7) if i not in read]
        assert torch.isnan(ours[others]).all(), "slots that were not read were written"
        verdict = compare(name, ours[read], low[read], exact[read])
        assert verdict.passed, str(verdict)


# --- determinism -----------------------------------------------------------------------------------------------------------


def run_twice(backend: str, case: Case, device: str):
    x = draw(case, device)
    skip_unless_supported(backend, case, x, device)
    opts = options(case, device)
    run = lambda *t, q_depth: moda_attention(*t, q_depth=q_depth, backend=backend, return_lse=True, **opts)  # noqa: E731
    return differentiate(run, x), differentiate(run, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_has_the_same_bits_twice_small(backend: str) -> None:
    first, second = run_twice(backend, Case(S=4), "cuda" if GPU else "cpu")
    assert torch.equal(first["out"], second["out"]) and torch.equal(first["lse"], second["lse"])


@pytest.mark.gpu
@pytest.mark.parametrize("C", (1, 8), ids=("own", "chunk8"))
@pytest.mark.parametrize("backend", ("fused", "split"))
def test_same_bits_twice(backend: str, C: int) -> None:
    """Forward: every bit. Backward: ``fused`` has no atomics, every gradient has the same bits."""
    first, second = run_twice(backend, Case(T=2000, G=8, S=17, D=64, dtype="bf16", C=C), "cuda")
    assert torch.equal(first["out"], second["out"]) and torch.equal(first["lse"], second["lse"])
    if backend == "fused":
        for name in ("dq", "dk", "dv", "ddepth_k", "ddepth_v"):
            assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("D", (64, 128))
@pytest.mark.parametrize("kernel", ("forward", "keys", "queries"))
def test_every_named_tile_is_right(kernel: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile that autotuning may choose, judged alone."""
    module = importlib.import_module(f"moda_kernels.moda_attention.fused.{kernel}")
    for tile in module.HALF_TILES if D <= 64 else module.WIDE_HEAD_TILES:
        monkeypatch.setattr(module._chooser, "tiles", lambda p, tile=tile: (tile,))
        monkeypatch.setattr(module._chooser, "chosen", {})
        judge("fused", Case(T=333, G=8, S=9, D=D, dtype="bf16"), "cuda")


# --- the choice of a backend ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_auto_remembers_its_choice_for_all_that_backends_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """G = 8 first at depth_chunk 4 takes ``fused``; G = 64, which ``fused`` refuses, still gets the reference."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    kinds = [
        Kind(
            device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=64, group=group, causal=True, depth_chunk=4,
            has_sequence=True, packed=False, one_token=False, sequence_kernel=None, interpreted=False,
        )
        for group in (8, 64, 8)
    ]  # fmt: skip
    choose_backend.cache_clear()
    try:
        assert [choose_backend(kind).name for kind in kinds] == ["fused", "reference", "fused"]
        assert choose_backend(kinds[0]._replace(dtype=torch.float32)).name == "reference"
    finally:
        choose_backend.cache_clear()


def test_a_kind_tells_apart_what_backends_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 2, 16)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    kinds = [
        make_problem(Inputs(q, k, k)).kind,
        make_problem(Inputs(q, k[:, :, :1], k[:, :, :1])).kind,
        make_problem(Inputs(q, k, k), causal=False).kind,
        make_problem(Inputs(q, k, k), depth_chunk=4).kind,
        make_problem(Inputs(q, k, k), cu_seqlens=cu).kind,
        make_problem(Inputs(q, None, None, k[None], k[None])).kind,
        make_problem(Inputs(q[:, :1], k[:, :1], k[:, :1])).kind,
        make_problem(Inputs(q.half(), k.half(), k.half())).kind,
        make_problem(Inputs(q[..., :8], k[..., :8], k[..., :8])).kind,
    ]
    monkeypatch.setenv("MODA_SEQUENCE_KERNEL", "triton")
    kinds.append(make_problem(Inputs(q, k, k)).kind)
    assert len(set(kinds)) == len(kinds)
    assert make_problem(Inputs(q, k, k)).kind == kinds[-1]


# --- slots ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", ([1, 2, 3], [4, 0, 2], range(0, 5, 2), []), ids=str)
def test_slots_may_be_ints_or_a_tensor_in_any_order(slots: Sequence[int]) -> None:
    x = draw(Case(S=5, dtype="fp32"), "cpu")
    leaves = [x[n].requires_grad_() for n in NAMES[:-1]]
    numbers = list(slots)
    index = torch.tensor(numbers, dtype=torch.long)
    results = []
    for given in (slots, index, index.int()):
        out = moda_attention(*leaves, slots=given, backend="reference")
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    picked = [*leaves[:3], *(t[sorted(numbers)] for t in leaves[3:])]
    out = moda_attention(*picked, backend="reference")
    wanted = [out, *torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)]
    for a, b in zip(results[0], wanted, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=0, atol=1e-6)
    unread = [i for i in range(5) if i not in numbers]
    assert not results[0][4][unread].any() and not results[0][5][unread].any()


def test_a_run_of_slots_is_read_through_views(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_run((2, 3, 4)) == (2, 5) and as_run((7,)) == (7, 8) and as_run((0, 2)) is None
    seen = []
    x = draw(Case(S=5, dtype="fp32"), "cpu")
    p = make_problem(Inputs(*(x[n] for n in NAMES)))
    reference = get_backend("reference", p.kind)
    right = reference.forward

    def forward(p, x):
        seen.append((p.slots, p.n_slots, x.depth_k.shape[0], x.depth_k.data_ptr()))
        return right(p, x)

    monkeypatch.setattr(reference, "forward", forward)
    tensors = [x[n] for n in NAMES[:-1]]
    for slots in ([3, 2], [0, 3]):
        moda_attention(*tensors, slots=slots, backend="reference")
    depth_k = x["depth_k"]
    assert seen == [(None, 2, 2, depth_k[2].data_ptr()), ((0, 3), 2, 5, depth_k.data_ptr())]


def test_slots_in_a_compiled_function() -> None:
    x = draw(Case(S=5, dtype="fp32"), "cpu")
    leaves = [x[n].requires_grad_() for n in NAMES[:-1]]

    def run(q, k, v, depth_k, depth_v):
        return moda_attention(q, k, v, depth_k, depth_v, slots=[0, 2, 3], backend="reference").sin()

    torch._dynamo.reset()
    eager, compiled = run(*leaves), torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager.sum(), leaves), torch.autograd.grad(compiled.sum(), leaves)):
        assert torch.equal(a, b)


# --- bad input -------------------------------------------------------------------------------------------------------------


def good() -> dict[str, torch.Tensor]:
    r = torch.randn
    return dict(
        q=r(1, 6, 4, 16), k=r(1, 6, 2, 16), v=r(1, 6, 2, 16), depth_k=r(3, 1, 6, 2, 16), depth_v=r(3, 1, 6, 2, 16)
    )


BAD = {
    "q-rank": (dict(q=torch.zeros(6, 4, 16)), "q must be of shape", "[6, 4, 16]"),
    "q-type": (dict(q=3), "q must be a torch.Tensor", "int"),
    "q-dtype": (dict(q=torch.zeros(1, 6, 4, 16, dtype=torch.int32)), "q must be of dtype", "int32"),
    "k-length": (dict(k=torch.zeros(1, 5, 2, 16)), "k must be of shape [1, 6, 2, 16]", "[1, 5, 2, 16]"),
    "heads": (dict(q=torch.zeros(1, 6, 3, 16)), "head count", "3"),
    "v-missing": (dict(v=None), "v must be given together with k", "None"),
    "depth_v-missing": (dict(depth_v=None), "depth_v must be given together with depth_k", "None"),
    "depth_k-slots": (dict(depth_k=torch.zeros(2, 1, 6, 2, 16)), "depth_v must be of shape [2", "[3, 1, 6, 2, 16]"),
    "v-dtype": (dict(v=torch.zeros(1, 6, 2, 16, dtype=torch.float64)), "v must be of q's dtype", "float64"),
    "depth_chunk": (dict(depth_chunk=0), "depth_chunk must be an integer >= 1", "0"),
    "scale": (dict(scale=-1.0), "scale must be a finite number > 0", "-1.0"),
    "cu_seqlens-end": (dict(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)), "cu_seqlens must be", "[0, 4]"),
    "cu_seqlens-dtype": (dict(cu_seqlens=torch.tensor([0, 6])), "cu_seqlens must be an int32 tensor", "int64"),
    "backend": (dict(backend="triton"), "backend must be one of auto, reference, fused, split", "'triton'"),
    "slots-range": (dict(slots=[0, 3]), "slots must be numbers from 0 to S - 1 = 2", "[0, 3]"),
    "slots-negative": (dict(slots=[-1]), "slots must be numbers from 0 to S - 1 = 2", "[-1]"),
    "slots-twice": (dict(slots=[1, 1]), "slots must be numbers that differ", "[1, 1]"),
    "slots-type": (dict(slots=[0.5]), "slots must be a 1-D int32 or int64 tensor or a sequence of ints", "[0.5]"),
    "slots-rank": (dict(slots=torch.zeros(1, 1, dtype=torch.int64)), "slots must be a 1-D int32 or int64", "[1, 1]"),
    "slots-dtype": (dict(slots=torch.zeros(1)), "slots must be a 1-D int32 or int64", "float32"),
    "slots-without-depth": (
        dict(depth_k=None, depth_v=None, slots=[0]),
        "slots must be None where there are no",
        "[0]",
    ),
    "depth-only-without-slots": (
        dict(k=None, v=None, slots=[]),
        "depth_k must be given with at least one slot",
        "none",
    ),
    "depth-only-without-depth": (dict(k=None, v=None, depth_k=None, depth_v=None), "depth_k must be given", "none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_argument_expected_and_received(name: str) -> None:
    change, expected, received = BAD[name]
    arguments = {**good(), **change}
    with pytest.raises(ValueError) as error:
        moda_attention(*[arguments.pop(n) for n in NAMES[:-1]], **arguments)
    assert expected in str(error.value) and received in str(error.value), str(error.value)


@pytest.mark.parametrize("backend", ("fused", "split"))
def test_an_explicit_backend_never_falls_back(backend: str) -> None:
    """fp64 is the reference's alone: the others refuse it, naming the argument."""
    x = {n: t.double().to("cuda" if GPU else "cpu") for n, t in good().items()}
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this.*float64|{backend}.*q"):
        moda_attention(*(x[n] for n in NAMES[:-1]), backend=backend)


def test_fused_refuses_head_dims_it_cannot_tile() -> None:
    q = torch.randn(1, 4, 2, 20, dtype=torch.float16, device="cuda" if GPU else "cpu")
    with pytest.raises(ValueError, match="head dim must be a multiple of 8 up to 128, got 20"):
        moda_attention(q, q, q, backend="fused")


@pytest.mark.gpu
def test_fused_refuses_fp32_on_a_gpu() -> None:
    q = torch.randn(1, 4, 2, 32, device="cuda")
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float16, got torch.float32"):
        moda_attention(q, q, q, backend="fused")


def test_fused_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    q = torch.randn(1, 4, 2, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match="backend 'fused' cannot run this: q: a CUDA device is needed"):
        moda_attention(q, q, q, backend="fused")
