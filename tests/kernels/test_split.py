"""The split backend's own parts: the choice of sequence kernel, tiles and packing, deferred flush against immediate gradients.

Output, LSE and every gradient against the yardstick are in ``test_moda_attention.py``, whole streams in ``test_depth_stream.py``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import types
from typing import Any

import pytest
import torch

from moda_kernels.moda_attention import Deferred, DepthGradients, Inputs, make_problem
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.moda_attention.tiles import Tile
from moda_kernels.yardstick import FACTOR, FLOOR, compare, relative_error

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

forward_module = importlib.import_module("moda_kernels.moda_attention.split.depth_forward")
backward_module = importlib.import_module("moda_kernels.moda_attention.split.depth_backward")
flush_module = importlib.import_module("moda_kernels.moda_attention.split.flush")
sequence = importlib.import_module("moda_kernels.moda_attention.split.sequence")
split = importlib.import_module("moda_kernels.moda_attention.split").backend

#: The interpreter's bf16 products are not trustworthy.
DTYPE = torch.bfloat16 if GPU else torch.float16
#: Kernels that do the same sums in another order or grouping differ by roundings of this dtype only.
SAME = {dtype: FACTOR * FLOOR[dtype] for dtype in (torch.bfloat16, torch.float16)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(DEVICE, DTYPE)


def depth_case(B: int = 1, T: int = 3, Hk: int = 2, G: int = 2, D: int = 32, S: int = 7) -> dict[str, Any]:
    q, do = draw(B, T, Hk * G, D), draw(B, T, Hk * G, D, seed=1)
    k, v = draw(S + 2, B, T, Hk, D, seed=2)[1 : S + 1], draw(S + 1, B, T, Hk, D, seed=3)[:S]  # two slot strides
    return dict(q=q, do=do, k=k, v=v, merged=forward_module.depth_forward(q, k, v, D**-0.5), scale=D**-0.5)


def immediate(
    c: dict[str, Any], fresh: tuple[int, int], start: torch.Tensor | None = None, **options: Any
) -> list[Any]:
    """dq and the depth gradients, added to ``start`` outside ``fresh``, where the buffers hold NaN."""
    grads = [torch.full_like(c["k"], float("nan"), memory_format=torch.contiguous_format) for _ in range(2)]
    if start is not None:
        for g in grads:
            g.copy_(start)
            g[fresh[0] : fresh[1]] = float("nan")
    return [backward(c, DepthGradients(grads[0], grads[1], fresh), **options), *grads]


def backward(c: dict[str, Any], depth: Any, **options: Any) -> torch.Tensor:
    return backward_module.depth_backward(
        c["do"], c["q"], c["k"], c["v"], c["merged"], c["scale"], depth, **options
    )  # fmt: skip


SIZES = [
    pytest.param(dict(), id="G2"),
    pytest.param(dict(Hk=4, G=3, D=40, S=5), id="G3-D40"),
    pytest.param(dict(Hk=1, G=8, S=17), id="G8"),
    pytest.param(dict(Hk=1, G=17, T=1, S=3), id="G17"),
    pytest.param(dict(Hk=8, G=1, T=2, S=1), id="G1-S1"),
]


@pytest.mark.parametrize("size", SIZES)
def test_packing_and_tiles_do_not_change_the_result(size: dict[str, int]) -> None:
    c = depth_case(**size)
    S = c["k"].shape[0]
    truth = immediate(c, (0, S), tile=Tile(keys=16, stages=1, warps=1, heads=1))
    for tile in (None, Tile(keys=32, stages=2, warps=1)):
        out, lse = forward_module.depth_forward(c["q"], c["k"], c["v"], c["scale"], tile=tile)
        assert relative_error(out, c["merged"].out) < SAME[DTYPE]
        assert relative_error(lse, c["merged"].lse) < 1e-6
        for a, b in zip(immediate(c, (0, S), tile=tile), truth, strict=True):
            if S == 1 and b is not truth[2]:  # the only probability is 1: dq and dK are zero but for its rounding
                assert max(a.abs().max(), b.abs().max()) < 1e-5 * c["do"].abs().max()
            else:
                assert relative_error(a, b) < SAME[DTYPE]


@pytest.mark.parametrize("size", SIZES)
def test_flush_equals_immediate(size: dict[str, int]) -> None:
    """Three layers kept and flushed in parts, by both kernels, with stored and added slots; outside the flush nothing moves."""
    cases = [depth_case(**size) for _ in range(3)]
    for i, c in enumerate(cases):
        c["q"] = draw(*c["q"].shape, seed=10 + i)
        c["merged"] = forward_module.depth_forward(c["q"], c["k"], c["v"], c["scale"])
    k = cases[0]["k"]
    S, first = k.shape[0], 2
    start = draw(*k.shape, seed=5)
    pending = flush_module.LayerProducts(4, S + first, cases[0]["q"])
    for buffer in (pending.p, pending.ds, pending.q, pending.do):
        buffer.fill_(float("nan"))
    for i, c in enumerate(cases):
        dq = backward(c, Deferred(pending, i + 1, first))
        assert torch.equal(dq, immediate(c, (0, S))[0])
    grads = [torch.full((S + first + 1, *k.shape[1:]), float("nan"), dtype=DTYPE, device=DEVICE) for _ in range(2)]
    cut = max(0, S - 3)
    for g in grads:
        g[first + cut : first + S] = start[cut:]
    for lo, hi in ((0, cut), (cut, S)):
        if lo < hi:  # slots below `cut` are fresh, the others are added to
            fresh = (0, max(0, min(hi, cut) - lo))
            pending.flush((1, 4), tuple(range(first + lo, first + hi)), DepthGradients(grads[0], grads[1], fresh))
    wanted = [torch.zeros(k.shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    for c in cases:
        for total, g in zip(wanted, immediate(c, (0, S))[1:], strict=True):
            total += g.double()
    for g, total in zip(grads, wanted, strict=True):
        total[cut:] += start[cut:].double()
        assert relative_error(g[first : first + S], total) < SAME[DTYPE]
        assert g[:first].isnan().all() and g[first + S :].isnan().all()


LISTED = [(0, 2, 4, 6, 8), (1, 2, 5, 8), (0, 8), (0, 1, 2, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize("size", [dict(), dict(Hk=1, G=3, D=40), dict(Hk=8, G=1, T=2)], ids=["G2", "G3-D40", "G1"])
@pytest.mark.parametrize("slots", LISTED, ids=str)
def test_a_list_of_slots_is_read_as_if_they_were_a_run(slots: tuple[int, ...], size: dict[str, int]) -> None:
    """The same bits as from a copy of the slots, forward and backward, stored, added and deferred; other slots stay."""
    c = depth_case(**size, S=9)
    index = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    picked = {**c, "k": c["k"][index], "v": c["v"][index]}
    n = len(slots)
    for case, table in ((c, index), (picked, None)):
        case["merged"] = forward_module.depth_forward(case["q"], case["k"], case["v"], case["scale"], table=table)
    assert all(torch.equal(a, b) for a, b in zip(c["merged"], picked["merged"], strict=True))
    start = draw(*c["k"].shape, seed=7)
    for fresh in ((0, n), (1, 2), (0, 0)):
        wanted = immediate(picked, fresh, start[index])
        grads = [start.clone() for _ in range(2)]
        for g in grads:
            g[index[fresh[0] : fresh[1]]] = float("nan")
        dq = backward(c, DepthGradients(grads[0], grads[1], fresh), table=index)
        assert torch.equal(dq, wanted[0])
        for g, want in zip(grads, wanted[1:], strict=True):
            assert torch.equal(g[index], want)
            g[index] = start[index]
            assert torch.equal(g, start)
    pending = flush_module.LayerProducts(2, 9, c["q"])
    for at in (0, 1):
        assert torch.equal(backward(c, Deferred(pending, at, 0), table=index), wanted[0])
    grads = [start.clone() for _ in range(2)]
    pending.flush((0, 2), slots, DepthGradients(grads[0], grads[1], (1, n)))
    for g, alone in zip(grads, immediate(picked, (0, n))[1:], strict=True):
        want = 2 * alone.double()
        want[0] += start[slots[0]].double()
        assert relative_error(g[index], want) < SAME[DTYPE]
        g[index] = start[index]
        assert torch.equal(g, start)


def test_gradients_are_stored_where_fresh_and_added_elsewhere() -> None:
    c = depth_case(S=9)
    start = draw(*c["k"].shape, seed=7)
    alone = immediate(c, (0, 9))
    for fresh in ((0, 9), (0, 4), (3, 8), (0, 0)):
        got = immediate(c, fresh, start)
        for a, b in zip(got[1:], alone[1:], strict=True):
            wanted = b.double() + start.double()
            wanted[fresh[0] : fresh[1]] = b[fresh[0] : fresh[1]].double()
            assert relative_error(a, wanted) < SAME[DTYPE]


def test_query_gradient_is_added_in_place() -> None:
    c = depth_case()
    alone = immediate(c, (0, 7))[0]
    to = draw(*alone.shape, seed=8)
    wanted = alone.double() + to.double()
    result = immediate(c, (0, 7), add_to=to)[0]
    assert result is to
    assert relative_error(to, wanted) < SAME[DTYPE]


def problem(**options: Any) -> Any:
    q = draw(1, options.pop("T", 4), 2, options.pop("D", 32)).to(options.pop("dtype", DTYPE))
    return make_problem(Inputs(q, q, q), **options)


def test_an_unknown_sequence_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODA_SEQUENCE_KERNEL", "flash4")
    with pytest.raises(ValueError, match="MODA_SEQUENCE_KERNEL must be one of flash_attn_4, cudnn, .*, got 'flash4'"):
        split.unsupported(problem().kind)


def test_a_forced_sequence_kernel_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODA_SEQUENCE_KERNEL", "flash_attn_3")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    sequence._present.cache_clear()
    reason = split.unsupported(problem().kind)
    sequence._present.cache_clear()
    assert reason is not None and "'flash_attn_3' was asked for" in reason
    with pytest.raises(ValueError, match="flash_attn_3"):
        sequence.choose(problem().kind)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(depth_chunk=4), "depth_chunk 4"),
        (dict(D=36), "head dim 36"),
        (dict(dtype=torch.float64), "dtype torch.float64"),
    ],
    ids=["depth_chunk", "head_dim", "dtype"],
)
def test_what_split_cannot_do_it_refuses_by_name(options: dict[str, Any], words: str) -> None:
    reason = split.unsupported(problem(**options).kind)
    assert reason is not None and words in reason


@pytest.mark.parametrize("major, module", [(3, "flash_attn_interface"), (2, "flash_attn.flash_attn_interface")])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_flash_attn_packages_are_called_as_they_are_written(
    monkeypatch: pytest.MonkeyPatch, major: int, module: str, packed: bool
) -> None:
    """The packages are not installed here: stand-ins with the signatures of their sources stand for them."""
    seen: dict[str, Any] = {}

    def forward3(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
        seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False,
    ):  # fmt: skip
        seen.update(cu=cu_seqlens_q, longest=max_seqlen_k, scale=softmax_scale, causal=causal, q=q)
        return (
            q + 1,
            q.new_zeros(q.shape[-2], q.shape[-3]) if q.ndim == 3 else q.new_zeros(1, q.shape[2], q.shape[1]),
            None,
        )

    def backward3(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    ):  # fmt: skip
        seen.update(cu=cu_seqlens_k, longest=max_seqlen_q, scale=softmax_scale, causal=is_causal)
        for grad, x in ((dq, q), (dk, k), (dv, v)):
            grad.copy_(2 * x)

    def forward2(
        q, k, v, *packing, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        cu, longest = (packing[0], packing[3]) if packing else (None, None)
        return forward3(q, k, v, cu_seqlens_q=cu, max_seqlen_k=longest, softmax_scale=softmax_scale, causal=causal)

    def backward2(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, *packing, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic,
    ):  # fmt: skip
        cu, longest = (packing[1], packing[2]) if packing else (None, None)
        grads = dict(dq=dq, dk=dk, dv=dv)
        options = dict(cu_seqlens_k=cu, max_seqlen_q=longest, softmax_scale=softmax_scale, is_causal=causal)
        backward3(dout, q, k, v, out, softmax_lse, **grads, **options)

    fake = types.ModuleType(module)
    functions = (forward3, backward3) if major == 3 else (forward2, backward2)
    for name, function in zip(("_flash_attn_forward", "_flash_attn_backward"), functions, strict=True):
        setattr(fake, name, function)
        setattr(fake, name.replace("attn_", "attn_varlen_"), function)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, fake)
    kernel = sequence._KERNELS[f"flash_attn_{major}"]
    cu = torch.tensor([0, 1, 4], dtype=torch.int32, device=DEVICE) if packed else None
    p = problem(cu_seqlens=cu, scale=0.3)
    q = draw(1, 4, 2, 32)
    out, lse = kernel.forward(p, q, q, q)
    assert torch.equal(out, q + 1) and lse.shape == (1, 2, 4)
    assert seen["scale"] == 0.3 and seen["causal"] and seen["cu"] is cu and seen["longest"] == (3 if packed else None)
    dq, dk, dv = kernel.backward(p, q, q, q, q, out, lse)
    assert torch.equal(dq, 2 * q) and torch.equal(dv, 2 * q) and dk.shape == q.shape
    assert seen["scale"] == 0.3 and seen["causal"] and seen["cu"] is cu and seen["longest"] == (3 if packed else None)


@pytest.fixture
def flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package, installed on a machine that has a Hopper GPU. Its functions take what the real ones take."""
    fake: Any = types.ModuleType("flash_attn.cute.interface")
    fake.seen = []

    def forward(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, return_lse=False,
    ):  # fmt: skip
        fake.seen.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse))
        return q + 1, q.new_zeros(*q.shape[:-3], q.shape[-2], q.shape[-3]), None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None,
    ):  # fmt: skip
        assert out.shape == dout.shape == q.shape and lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
        fake.seen.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, True))
        return 2 * q, 3 * k + dout, 4 * v + out

    fake._flash_attn_fwd, fake._flash_attn_bwd = forward, backward
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flash-attn-4": "4.0.0b99"}[name])
    monkeypatch.delenv("MODA_SEQUENCE_KERNEL", raising=False)
    sequence._present.cache_clear()
    yield fake
    sequence._present.cache_clear()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_flash_attention_4_is_called_as_it_is_written(flash_attention_4: Any, packed: bool) -> None:
    kernel = sequence._KERNELS["flash_attn_4"]
    cu = torch.tensor([0, 1, 4], dtype=torch.int32, device=DEVICE) if packed else None
    p = problem(cu_seqlens=cu, scale=0.3)
    q, do = draw(1, 4, 2, 32), draw(1, 4, 2, 32, seed=1)
    out, lse = kernel.forward(p, q, q, q)
    assert torch.equal(out, q + 1) and lse.shape == (1, 2, 4)
    dq, dk, dv = kernel.backward(p, do, q, q, q, out, lse)
    assert torch.equal(dq, 2 * q) and torch.equal(dk, 3 * q + do) and torch.equal(dv, 4 * q + out)
    longest = 3 if packed else None
    assert flash_attention_4.seen == 2 * [(cu, cu, longest, longest, 0.3, True, True)]


def test_flash_attention_4_comes_first_where_it_can_run(
    flash_attention_4: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = problem(dtype=torch.bfloat16).kind._replace(device=torch.device("cuda", 0))
    assert sequence.choose(kind).describe() == "flash_attn_4 (flash-attn-4 4.0.0b99)"
    assert sequence.choose(kind._replace(packed=True, group=8)).name == "flash_attn_4"
    assert sequence.choose(kind._replace(sequence_kernel="triton")).name == "triton"
    reason = sequence._KERNELS["flash_attn_4"].unsupported(kind._replace(head_dim=256))
    assert reason == "head dim 256: flash_attn_4 takes multiples of 8 up to 128"
    wide = kind._replace(head_dim=112)
    assert sequence.choose(wide).name == "flash_attn_4" != sequence.choose(wide._replace(causal=False)).name


@pytest.mark.parametrize(
    "breaks, reason",
    [
        (lambda m, fake: m.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0)), "capability 9.x or 10.x"),
        (lambda m, fake: m.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0)), "capability 9.x or 10.x"),
        (lambda m, fake: m.setattr(importlib.metadata, "version", _not_installed), "the package flash-attn-4 is not inst"),
        (lambda m, fake: m.setitem(sys.modules, fake.__name__, None), "got 4.0.0b99: importing .* fails: ModuleNotFound"),
        (lambda m, fake: m.delattr(fake, "_flash_attn_bwd"), "needs flash-attn-4 4.0.0b36 or .*: it has no _flash_attn_bwd"),
        (lambda m, fake: m.setattr(fake, "_flash_attn_fwd", lambda q, k, v: q), "fwd does not take causal, cu_seqlens_k,"),
    ],
    ids=["ampere", "consumer", "not_installed", "broken", "renamed", "other_arguments"],
)  # fmt: skip
def test_flash_attention_4_that_cannot_be_used_says_why(
    flash_attention_4: Any, monkeypatch: pytest.MonkeyPatch, breaks: Any, reason: str
) -> None:
    breaks(monkeypatch, flash_attention_4)
    kind = problem().kind._replace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match=f"'flash_attn_4' was asked for: .*{reason}"):
        sequence.choose(kind._replace(sequence_kernel="flash_attn_4"))
    assert sequence.choose(kind).name != "flash_attn_4"


def _not_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_flash_attention_4_alone_is_not_taken_for_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Its wheel has a folder ``flash_attn`` without a module."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    reason = sequence._KERNELS["flash_attn_2"].missing(torch.device("cuda", 0))
    assert reason == "flash_attn_2: the package flash_attn is not installed"
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert sequence._KERNELS["flash_attn_2"].missing(torch.device("cuda", 0)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn_4", "cudnn", "triton", "flash"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_sequence_kernels_agree_on_the_joint_softmax(monkeypatch: pytest.MonkeyPatch, name: str, causal: bool) -> None:
    """Every kernel present, given the merged pair, against the naive equation in fp64."""
    monkeypatch.setenv("MODA_SEQUENCE_KERNEL", name)
    if name == "flash_attn_4" and (reason := sequence._KERNELS[name].missing(torch.device(DEVICE))) is not None:
        pytest.skip(reason)
    c = depth_case(B=2, T=130, Hk=2, G=4, D=64, S=11)
    x = Inputs(c["q"], draw(2, 130, 2, 64, seed=20), draw(2, 130, 2, 64, seed=21), c["k"], c["v"])
    p = make_problem(x, causal=causal)
    saved = split.forward(p, x)
    dk, dv = (torch.empty(c["k"].shape, dtype=DTYPE, device=DEVICE) for _ in range(2))
    depth = DepthGradients(dk, dv, fresh=(0, 11))
    dlse = torch.randn_like(saved.lse)
    grads = split.backward(p, c["do"], dlse, x, saved, depth)

    def naive(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in x[:5]]
        result = naive_attention(*leaves, causal=causal)
        return (*result, *torch.autograd.grad(result, leaves, (c["do"].to(dtype), dlse.to(result[1].dtype))))

    results = zip((*saved, *grads[:3], depth.k, depth.v), naive(DTYPE), naive(torch.float64), strict=True)
    for label, tensors in zip(("out", "lse", "dq", "dk", "dv", "ddepth_k", "ddepth_v"), results):
        assert compare(label, *tensors).passed, str(compare(label, *tensors))
