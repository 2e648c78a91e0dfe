"""Sums over sources: the kernels against PyTorch, and a stream of sources against autograd on a list."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_kernels.benchmarks.sources import _draw as drawn
from moda_kernels.benchmarks.sources import moved, sources_table
from moda_kernels.benchmarks.timing import Quantiles
from moda_kernels.sources import NaiveSums, Sources, Sums, Target, fastest
from moda_kernels.yardstick import report, verdicts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def mixed(sums: Sums, x: Tensor, weights: Tensor, grads: list[Tensor], given: Tensor, new: tuple[int, int]) -> Any:
    to = Target(given.to(x.dtype, copy=True)[::2], new)
    return {
        "out": torch.stack(sums.mix(x, weights)),
        "weights": sums.mix_backward(x, weights, grads, to),
        "sources": to.grad,
    }


def attended(sums: Sums, x: Tensor, queries: Tensor, grads: list[Tensor], given: Tensor, new: tuple[int, int]) -> Any:
    to, wide = Target(given.to(x.dtype, copy=True)[::2], new), torch.promote_types(x.dtype, torch.float32)
    out, lse = sums.attend(x, queries.to(wide), EPS)
    *grads, grad_lse = grads
    grad_lse = grad_lse[..., : len(out)].movedim(-1, 0).to(wide)
    grad_queries = sums.attend_backward(x, queries.to(wide), EPS, out, lse, grads, grad_lse, to)
    return {"out": torch.stack(out), "lse": lse, "queries": grad_queries, "sources": to.grad}


def judge(n: int, tokens: tuple[int, int], d: int, c: int, kind: str, new: tuple[int, int], dtype: torch.dtype) -> None:
    """Sources are every second row of a buffer; those that are new have NaN in the place of their gradient."""
    from moda_kernels.sources.kernel import FusedSums

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, given = draw(2, 2 * n, *tokens, d)
    given[::2][slice(*new)] = float("nan")
    run = attended if kind == "attend" else mixed
    weights = draw(c, d) if kind == "attend" else draw(*(() if kind == "static" else tokens), c, n)
    grads = [draw(*tokens, d) for _ in range(c + (kind == "attend"))]

    def at(sums: Sums, dtype: torch.dtype) -> Any:
        return run(sums, x.to(dtype)[::2], weights.to(dtype), [g.to(dtype) for g in grads], given, new)

    judged = verdicts(at(FusedSums(), dtype), at(NaiveSums(), dtype), at(NaiveSums(), torch.float64))
    assert all(v.passed for v in judged), report(judged)


CASES = [
    *((c, kind, (0, 3)) for c in (1, 2, 4) for kind in ("static", "by token", "attend")),
    (2, "by token", (1, 2)), (2, "attend", (2, 3)), (4, "static", (0, 0)),
]  # fmt: skip


@pytest.mark.parametrize("c, kind, new", CASES)
@pytest.mark.usefixtures("poisoned")
def test_the_kernels_are_the_plain_computation(c: int, kind: str, new: tuple[int, int]) -> None:
    """More rows than a program has, the last block not full, and rows narrower than a tile."""
    judge(3, (2, 23), 24, c, kind, new, torch.float32)


@pytest.mark.parametrize("kind", ["static", "by token", "attend"])
@pytest.mark.usefixtures("poisoned")
def test_one_source_and_wide_rows(kind: str) -> None:
    judge(1, (1, 2), 600, 1, kind, (0, 1), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [384, 1024, 2048])
@pytest.mark.parametrize("c, kind", [(1, "static"), (4, "by token"), (4, "static"), (2, "attend")])
@pytest.mark.usefixtures("poisoned")
def test_the_kernels_in_bf16(c: int, kind: str, d: int) -> None:
    judge(25, (2, 127), d, c, kind, (20, 25), torch.bfloat16)


def test_three_sums_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1, 2 or 4 sums at once, got 3"):
        judge(1, (1, 2), 8, 3, "static", (0, 1), torch.float32)


LAYERS, SHAPE = 5, (2, 3, 8)


def make_leaves() -> list[Tensor]:
    """A source, and per layer a matrix, weights by token and for all, and queries; fp64."""
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[int, ...]] = [SHAPE]
    for n in range(1, LAYERS + 1):
        shapes += [(8, 8), (*SHAPE[:2], 2, n), (1, (n + 1) // 2), (2, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).div(3).requires_grad_() for shape in shapes]


def with_stream(leaves: list[Tensor]) -> tuple[Tensor, Sources]:
    """Every layer reads all sources in two ways, and every second one in a third; it keeps what it writes, too."""
    x, *layers = leaves
    sources = Sources(LAYERS, fastest, x.device)
    for i in range(LAYERS):
        matrix, by_token, static, queries = layers[4 * i : 4 * i + 4]
        sources.write(x)
        a, b = sources.mix(by_token)
        (c,) = sources.mix(static, range(i % 2, i + 1, 2))
        (e, f), (lse, _) = sources.attend(queries, EPS)
        x = (a + x + c * lse[..., None] + b @ matrix * e - f).tanh()
    return x, sources


def with_list(leaves: list[Tensor]) -> Tensor:
    x, *layers = leaves
    written: list[Tensor] = []
    for i in range(LAYERS):
        matrix, by_token, static, queries = layers[4 * i : 4 * i + 4]
        written.append(x)
        every = torch.stack(written)
        a, b = torch.einsum("btcn,nbtd->cbtd", by_token, every)
        c = torch.einsum("n,nbtd->btd", static[0], every[i % 2 :: 2])
        unit = every * torch.rsqrt(every.square().mean(-1, keepdim=True) + EPS)
        logits = torch.einsum("cd,nbtd->ncbt", queries, unit)
        e, f = torch.einsum("ncbt,nbtd->cbtd", logits.softmax(0), every)
        x = (a + x + c * logits.logsumexp(0)[0, ..., None] + b @ matrix * e - f).tanh()
    return x


def gradients(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("frozen", [(), (0,), (2, 3, 4)], ids=str)
def test_gradients_equal_autograd_on_a_list(frozen: tuple[int, ...]) -> None:
    leaves = make_leaves()
    for i in frozen:
        leaves[i].requires_grad_(False)
    trained = [x for x in leaves if x.requires_grad]
    ours, truth = with_stream(leaves)[0], with_list(leaves)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(ours, trained), gradients(truth, trained)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_two_passes_alive_and_an_evaluation_between() -> None:
    leaves = make_leaves()
    ys = [with_stream(leaves)[0] for _ in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(with_stream(leaves)[0], ys[0])
    for y in reversed(ys):
        for a, b in zip(gradients(y, leaves), gradients(with_list(leaves), leaves)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
def test_sources_of_several_devices() -> None:
    """The first is on the CPU, where the buffer then is, the others are on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        shapes = (SHAPE, (*SHAPE[:2], 1, 2), (1, SHAPE[2]))
        x, by_token, queries = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_() for shape in shapes
        )
        sources = Sources(2, fastest)
        sources.write(x.cpu())
        sources.write(2 * x)
        (y,) = sources.mix(by_token)
        (z,), (lse,) = sources.attend(queries, EPS)
        assert {t.device.type for t in (y, z, lse)} == {device}
        grads = torch.autograd.grad((y * z * lse[..., None]).sum(), (x, by_token, queries))
        found.append([t.cpu() for t in (y, z, lse, *grads)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("part", [True, False], ids=["of some leaves", "of all"])
def test_a_second_backward_is_refused(part: bool) -> None:
    leaves = make_leaves()
    y, _ = with_stream(leaves)
    again = (lambda: torch.autograd.grad(y.sum(), leaves[-1:], retain_graph=True)) if part else y.sum().backward
    y.sum().backward(retain_graph=True) if not part else again()
    with pytest.raises(RuntimeError, match="ran twice over one forward pass"):
        again()


def test_a_loss_that_is_kept_keeps_no_buffers_and_none_keeps_the_stream() -> None:
    leaves = make_leaves()
    y, sources = with_stream(leaves)
    stream = weakref.ref(sources._stream)
    buffer = weakref.ref(sources._stream.read(range(1)).untyped_storage())
    del sources
    y.sum().backward()
    gc.collect()
    assert buffer() is None and stream() is not None
    del y
    gc.collect()
    assert stream() is None


def test_what_is_not_there_is_refused() -> None:
    sources = Sources(1, fastest)
    with pytest.raises(RuntimeError, match="some of 0 sources"):
        sources.attend(torch.zeros(1, 8), EPS)
    sources.write(torch.zeros(1, 2, 8))
    with pytest.raises(RuntimeError, match=r"some of 1 sources, got range\(0, 2\)"):
        sources.mix(torch.zeros(1, 2), range(2))
    with pytest.raises(RuntimeError, match="more than the 1 sources"):
        sources.write(torch.zeros(1, 2, 8))


def test_the_benchmark_times_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [("static", 1, 3, 32, 20), ("by token", 2, 3, 32, 20), ("attend", 2, 3, 32, 20)]
    monkeypatch.setattr("moda_kernels.benchmarks.sources._draw", _in_fp32)
    table = sources_table(cases, 1e9, DEVICE, lambda runs: [Quantiles(2.0, 1.0, 3.0, 5) for _ in runs])
    assert [row["pass"] for row in table] == ["forward", "backward", "backward-add"] * 3
    assert all(
        row["status"] == "ok" and row["over_floor"] == pytest.approx(2 / row["floor_ms"], rel=0.01) for row in table
    )
    assert moved(*cases[0], "forward") == 2 * 20 * 4 * 32 and moved(*cases[2], "backward-add") == 2 * 20 * (13 * 32 + 4)
    monkeypatch.setattr("moda_kernels.sources.kernel.FusedSums.mix", lambda self, x, w: tuple(x[: w.shape[-2]]))
    table = sources_table(cases[:1], 1e9, DEVICE, lambda runs: pytest.fail("timed"))
    assert {row["status"] for row in table} == {"parity failed"}


def _in_fp32(*case: Any) -> tuple[Any, ...]:
    """Triton's interpreter has no bf16."""
    x, weights, grads, grad_lse, grad = drawn(*case)
    return x.float(), weights.float(), [g.float() for g in grads], grad_lse, grad.float()
