"""Depth streams on the split backend: deferred and immediate gradients against plain autograd on a list of slots, and compiled.

The toy model has a layer's parts without its matrices: queries, keys and values are elementwise functions of the residual stream,
so that a slot's gradient reaches every earlier layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moda_kernels import ATTENTION, FFN, DepthLayout, DepthStream, depth_attention, depth_write, slot_attention
from moda_kernels.depth.deferral import Deferral
from moda_kernels.moda_attention import Deferred, Inputs, get_backend, make_problem
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.moda_attention.problem import as_run
from moda_kernels.yardstick import report, verdicts
from tests.kernels.layouts import LISTS, Choice, layout

pytest.importorskip("triton")
LayerProducts = importlib.import_module("moda_kernels.moda_attention.split.flush").LayerProducts

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
#: On the CPU the split backend runs in Triton's interpreter: few tokens, fp16.
DTYPE = torch.bfloat16 if GPU else torch.float16
Model = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def parts(x: torch.Tensor, w: torch.Tensor, hk: int, d: int) -> tuple[torch.Tensor, ...]:
    """q ``[B, T, Hq, D]`` and four ``[B, T, Hk, D]`` from ``x [B, T, Hq * D]`` and a layer's weights ``[5, Hq * D]``."""
    q = (x * w[0]).unflatten(-1, (-1, d))
    narrow = [(x * w[i]).unflatten(-1, (-1, d))[:, :, :hk] for i in range(1, 5)]
    return (q, *narrow)


def plain(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    layout: DepthLayout,
    hk: int,
    d: int,
    kept: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """The toy model on a list of every candidate, in x's dtype; ``kept`` is what becomes of what is written."""
    candidates: list[tuple[torch.Tensor, torch.Tensor]] = []
    for read, w in zip(layout.reads, weights):
        q, k, v, fk, fv = parts(x, w, hk, d)
        dk, dv = (torch.stack([candidates[c][i] for c in read]) if read else None for i in (0, 1))
        out, _ = naive_attention(q, k, v, dk, dv)
        candidates.extend([(kept(k), kept(v)), (kept(fk), kept(fv))][: layout.kinds])
        x = x + out.flatten(2)
    return x


def streamed(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    stream: DepthStream,
    hk: int,
    d: int,
    wrap: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """The toy model on a stream; ``wrap`` runs a layer in its own way (checkpointing)."""
    layout = stream.layout
    order = stream.start(x.device)

    def run(x: torch.Tensor, order: torch.Tensor, w: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, fk, fv = parts(x, w, hk, d)
        row = stream.layer_rows[layer]
        out, order = depth_attention(q, k, v, order, row)
        for kind, pair in ((ATTENTION, (k, v)), (FFN, (fk, fv))):
            if layout.written_slot(layer, kind) is not None:
                order = depth_write(order, *pair, row, kind)
        return x + out.flatten(2), order

    for layer, w in enumerate(weights):
        x, order = run(x, order, w, layer) if wrap is None else wrap(run, x, order, w, layer)
    return x


def toy(
    n_layers: int, T: int = 64 if GPU else 3, hk: int = 1, group: int = 2, d: int = 16
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(n_layers)
    x = torch.randn(2, T, hk * group * d, generator=g).to(DEVICE, DTYPE)
    weights = [0.5 * torch.randn(5, hk * group * d, generator=g).to(DEVICE, DTYPE) for _ in range(n_layers)]
    return x, weights


def gradients(run: Model, x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    x, weights = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in weights]
    out = run(x, weights)
    seed = torch.sin(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], seed)]


def judge(run: Model, plain_run: Model, x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """``run``'s output and gradients pass the yardstick of ``plain_run`` in the working dtype and in fp64.

    The layers' gradients are judged together: one layer's are few numbers, whose errors have come through all the others.
    """

    def named(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor | None]:
        return {"out": tensors[0], "x": tensors[1], "layers": torch.stack(tensors[2:])}

    result, low = gradients(run, x, weights), gradients(plain_run, x, weights)
    truth = gradients(plain_run, x.double(), [w.double() for w in weights])
    judged = verdicts(named(result), named(low), named(truth))
    assert all(v.passed for v in judged), report(judged)


CASES = [
    *(
        pytest.param(
            layout(n, kinds=kinds, window=window),
            defer,
            id=f"L{n}-{'ffn' if kinds == 2 else 'attn'}-w{window}-b{defer}",
        )
        for n, kinds, window, defer in (
            (1, 2, None, 4),
            (2, 2, None, 8),
            (5, 2, None, 1),
            (6, 2, None, 2),
            (7, 2, None, 3),
            (5, 1, None, 3),
            (6, 2, 3, 4),
            (7, 1, 2, 3),
        )
    ),
    *(
        pytest.param(layout(5, choose=choose), defer, id=f"{name}-b{defer}")
        for name, choose in LISTS.items()
        for defer in (1, 3)
    ),
    pytest.param(layout(5, window=5, choose=LISTS["every-second"]), 8, id="dilated-window-b8"),
]


@pytest.mark.parametrize("own", [False, True], ids=["slots", "slots-and-own"])
@pytest.mark.parametrize("defer", [1, 3])
def test_slots_under_a_softmax_of_their_own(defer: int, own: bool, poisoned: None) -> None:
    """With one more pair per token, whose share is a function of the LSE, and without; the first layer reads no slot."""
    case, (x, weights) = layout(5, kinds=1), toy(5)

    def query(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q.unflatten(2, (k.shape[2], -1)).mean(3) if own else q

    def joined(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return x + (out.repeat_interleave(2, dim=2) if own else out).flatten(2)

    def lists(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        slots: list[tuple[torch.Tensor, ...]] = []
        for w in weights:
            q, k, v, *_ = parts(x, w, 1, 16)
            seen = [*slots, (k, v)] if own else slots
            slots = [*slots, (k, v)]
            if seen:
                dk, dv = (torch.stack([slot[i] for slot in seen]) for i in (0, 1))
                x = joined(x, naive_attention(query(q, k), None, None, dk, dv)[0])
        return x

    def stream(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        stream = DepthStream(case, "split", defer)
        order = stream.start(x.device)
        for layer, w in enumerate(weights):
            q, k, v, *_ = parts(x, w, 1, 16)
            row = stream.layer_rows[layer]
            out, order = slot_attention(query(q, k), order, row, (k, v) if own else None)
            if case.written_slot(layer, ATTENTION) is not None:
                order = depth_write(order, k, v, row, ATTENTION)
            x = joined(x, out)
        return x

    judge(stream, lists, x, weights)


@pytest.mark.parametrize("layout, defer", CASES)
def test_stream_equals_a_list_of_slots(layout: DepthLayout, defer: int, poisoned: None) -> None:
    x, weights = toy(layout.n_layers)
    judge(
        lambda x, w: streamed(x, w, DepthStream(layout, "split", defer=defer), 1, 16),
        lambda x, w: plain(x, w, layout, 1, 16),
        x,
        weights,
    )


@pytest.mark.parametrize("defer", (1, 3))
def test_deferred_under_checkpointing_and_two_forwards_alive(defer: int) -> None:
    five = layout(5)
    x, weights = toy(5)

    def run(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
        def again(*args: Any) -> Any:
            return checkpoint(*args, use_reentrant=False)

        first = streamed(x, w, DepthStream(five, "split", defer=defer), 1, 16, again)
        second = streamed(x * 0.5, w, DepthStream(five, "split", defer=defer), 1, 16)
        return first + second

    judge(run, lambda x, w: plain(x, w, five, 1, 16) + plain(x * 0.5, w, five, 1, 16), x, weights)


def test_every_layer_and_slot_is_flushed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each (layer, slot) pair is flushed exactly once and before the slot is taken, for any layout and any number of layers."""
    q = torch.zeros(1, 1, 1, 8, dtype=DTYPE, device=DEVICE)
    split: Any = get_backend("split", make_problem(Inputs(q, q, q)).kind)
    layouts = [layout(9), layout(9, kinds=1), layout(9, window=5), layout(8, window=1)]
    for case in [*layouts, *(layout(9, choose=choose) for choose in LISTS.values())]:
        for defer in (2, 3, 8, 20):
            pairs: list[tuple[int, int]] = []
            stream = DepthStream(case, "split", defer=defer)
            stream.k = stream.v = torch.zeros(case.training.total, 1, 1, 1, 8)
            pending: list[int] = []

            def flush(self: Any, layers: Any, slots: Any, to: Any) -> None:
                pairs.extend((pending[m], case.training.rows.index(s)) for m in range(*layers) for s in slots)  # noqa: B023

            monkeypatch.setattr(LayerProducts, "flush", flush)
            for layer in reversed(range(case.n_layers)):
                for kind in (FFN, ATTENTION):
                    slot = case.written_slot(layer, kind)
                    if slot is not None:
                        stream.take_gradient(slot)
                        readers = {m for m in range(case.n_layers) if slot in case.read_slots(m)}
                        assert {m for m, s in pairs if s == slot} == readers
                if case.read_slots(layer):
                    place = stream.depth_gradients(layer, split, q)
                    assert isinstance(place, Deferred)
                    if place.at == 0:
                        pending.clear()
                    pending.append(layer)
            assert len(pairs) == len(set(pairs)) == case.slots_read


def test_runs_of_slots_are_flushed_as_runs() -> None:
    """Contiguous layouts never take the index table; layers that read the same list share one flush of it."""
    for case, runs in (
        (layout(12), True),
        (layout(12, window=5), True),
        (layout(12, choose=LISTS["every-second"]), False),
    ):
        deferral = Deferral(SimpleNamespace(layers=8))  # type: ignore[arg-type]
        for layer in range(11, 3, -1):
            deferral.add(case.read_slots(layer))
        assert deferral.full
        flushes = deferral.take(0)
        assert not deferral.covers(0) and not deferral.take(0)
        assert sum((j - i) * len(slots) for (i, j), slots in flushes) == sum(
            len(case.read_slots(m)) for m in range(4, 12)
        )
        assert all(as_run(slots) is not None for _, slots in flushes if runs)
        if not runs:
            assert ((0, 8), case.read_slots(4)) in flushes


def test_defer_must_be_positive() -> None:
    with pytest.raises(ValueError, match="defer must be >= 1, got 0"):
        DepthStream(layout(2), defer=0)


def compiled_graphs(n_layers: int, choose: Choice = tuple) -> int:
    """How many graphs per-layer ``torch.compile`` makes of the toy model (without breaks)."""
    case = layout(n_layers, choose=choose)
    x, weights = toy(n_layers)
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def layer(x: torch.Tensor, order: torch.Tensor, w: torch.Tensor, row: torch.Tensor, last: bool) -> Any:
        q, k, v, fk, fv = parts(x, w, 1, 16)
        out, order = depth_attention(q, k, v, order, row)
        if not last:
            order = depth_write(order, k, v, row, ATTENTION)
            order = depth_write(order, fk, fv, row, FFN)
        return x + out.flatten(2), order

    torch._dynamo.reset()
    run = torch.compile(layer, backend=backend, fullgraph=True)

    def model(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
        stream = DepthStream(case, "split", defer=2)
        order = stream.start(x.device)
        for i, weight in enumerate(w):
            x, order = run(x, order, weight, stream.layer_rows[i], i == n_layers - 1)
        return x

    for _ in range(2):
        judge(model, lambda x, w: plain(x, w, case, 1, 16), x, weights)
    return graphs


def test_graphs_do_not_grow_with_the_layers() -> None:
    assert compiled_graphs(3) == compiled_graphs(7)


def test_lists_of_slots_need_no_graphs_of_their_own() -> None:
    assert compiled_graphs(4, lambda c: tuple(i for i in c if i != len(c) // 2)) == compiled_graphs(3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend, defer", [("split", 1), ("split", 2), ("split", 8), ("fused", 1)])
@pytest.mark.parametrize("pattern", ["all", *LISTS])
def test_stream_at_size(pattern: str, backend: str, defer: int) -> None:
    case = layout(12, choose=LISTS.get(pattern, tuple))
    x, weights = toy(12, T=260, hk=4, group=2, d=64)
    judge(
        lambda x, w: streamed(x, w, DepthStream(case, backend, defer=defer), 4, 64),
        lambda x, w: plain(x, w, case, 4, 64),
        x,
        weights,
    )
