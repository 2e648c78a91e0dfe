"""The depth stream against autograd on a plain list of slots, in fp64, and its lifetime."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moda_kernels import ATTENTION, FFN, DepthLayout, DepthStream, depth_attention, depth_write
from moda_kernels.depth.stream import _STREAMS
from moda_kernels.moda_attention.naive import naive_attention
from tests.kernels.layouts import LISTS, layout

B, T, HQ, HK, D = 2, 5, 4, 2, 8
Weights = list[tuple[torch.Tensor, ...]]
Kept = Callable[[torch.Tensor], torch.Tensor]


def make_weights(n_layers: int) -> Weights:
    g = torch.Generator().manual_seed(0)

    def w(heads: int) -> torch.Tensor:
        return torch.randn(HQ * D, heads * D, generator=g, dtype=torch.float64).requires_grad_()

    return [(w(HQ), w(HK), w(HK), w(HK), w(HK)) for _ in range(n_layers)]


def heads(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w / HQ / D).unflatten(-1, (-1, D))


def with_stream(
    x: torch.Tensor, weights: Weights, layout: DepthLayout, stream: DepthStream | None = None
) -> torch.Tensor:
    stream = stream or DepthStream(layout, "reference")
    order = stream.start()
    for layer, (wq, wk, wv, wfk, wfv) in enumerate(weights):
        row = stream.layer_rows[layer]
        q, k, v = heads(x, wq), heads(x, wk), heads(x, wv)
        out, order = depth_attention(q, k, v, order, row)
        if layout.written_slot(layer, ATTENTION) is not None:
            order = depth_write(order, k, v, row, ATTENTION)
        x = x + out.flatten(2).tanh()
        if layout.written_slot(layer, FFN) is not None:
            order = depth_write(order, heads(x, wfk), heads(x, wfv), row, FFN)
    return x


def with_lists(x: torch.Tensor, weights: Weights, layout: DepthLayout, kept: Kept = lambda x: x) -> torch.Tensor:
    """The same on a list of every candidate, by the naive equation; ``kept`` is what becomes of what is written."""
    candidates: list[tuple[torch.Tensor, torch.Tensor]] = []
    for read, (wq, wk, wv, wfk, wfv) in zip(layout.reads, weights):
        q, k, v = heads(x, wq), heads(x, wk), heads(x, wv)
        dk = torch.stack([candidates[c][0] for c in read]) if read else None
        dv = torch.stack([candidates[c][1] for c in read]) if read else None
        out, _ = naive_attention(q, k, v, dk, dv)
        candidates.append((kept(k), kept(v)))
        x = x + out.flatten(2).tanh()
        if layout.kinds == 2:
            candidates.append((kept(heads(x, wfk)), kept(heads(x, wfv))))
    return x


def gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True))


LAYOUTS = [
    *(
        pytest.param(layout(4, kinds=kinds, window=window), id=f"kinds={kinds}-window={window}")
        for kinds in (2, 1)
        for window in (None, 1, 3)
    ),
    *(pytest.param(layout(5, choose=choose), id=name) for name, choose in LISTS.items()),
    pytest.param(layout(5, window=5, choose=LISTS["every-second"]), id="dilated-window"),
    pytest.param(DepthLayout(((), (1,), (0, 3), (1, 2, 5), (0, 2, 3, 7))), id="new-slots-between-old-ones"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_autograd_on_a_list(layout: DepthLayout) -> None:
    weights = make_weights(layout.n_layers)
    x = torch.randn(B, T, HQ * D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *(w for layer in weights for w in layer)]
    ours, truth = with_stream(x, weights, layout), with_lists(x, weights, layout)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    for a, b in zip(gradients(ours, leaves), gradients(truth, leaves)):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=0, atol=1e-12)


def test_two_forward_passes_alive_at_once() -> None:
    weights = make_weights(3)
    three = layout(3)
    xs = [torch.randn(B, T, HQ * D, dtype=torch.float64) for _ in range(2)]
    leaves = [w for layer in weights for w in layer]
    ys = [with_stream(x, weights, three) for x in xs]
    for y, x in reversed(list(zip(ys, xs))):
        for a, b in zip(gradients(y, leaves), gradients(with_lists(x, weights, layout(3)), leaves)):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-12)


def test_frozen_writers() -> None:
    weights = make_weights(3)
    for layer in weights[:2]:
        for w in layer:
            w.requires_grad_(False)
    leaves = list(weights[2])
    x = torch.randn(B, T, HQ * D, dtype=torch.float64)
    ours = gradients(with_stream(x, weights, layout(3)), leaves)
    truth = gradients(with_lists(x, weights, layout(3)), leaves)
    # The last layer's wq, wk, wv have gradients; what would write its FFN slot is not used at all.
    for grads in (ours, truth):
        assert [g is None for g in grads] == [False, False, False, True, True]
    for a, b in zip(ours[:3], truth[:3]):
        assert a is not None and b is not None and b.any() and torch.allclose(a, b, rtol=0, atol=1e-12)


def test_evaluation_between_forward_and_backward() -> None:
    weights = make_weights(3)
    x = torch.randn(B, T, HQ * D, dtype=torch.float64)
    leaves = [w for layer in weights for w in layer]
    y = with_stream(x, weights, layout(3))
    with torch.no_grad():
        with_stream(x + 1, weights, layout(3))
    for a, b in zip(gradients(y, leaves), gradients(with_lists(x, weights, layout(3)), leaves)):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-12)


def test_a_second_backward_is_refused() -> None:
    weights = make_weights(2)
    y = with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), weights, layout(2)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice over one forward pass"):
        y.backward()


def test_reading_before_writing_is_refused() -> None:
    stream = DepthStream(layout(2), "reference")
    order = stream.start()
    q = torch.randn(1, 2, 2, 8)
    with pytest.raises(RuntimeError, match=r"slots \[0, 1\] are read before they are written"):
        depth_attention(q, q, q, order, stream.layer_rows[1])


def test_the_stream_lives_as_long_as_its_graph() -> None:
    gc.collect()
    before = len(_STREAMS)
    y = with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), make_weights(3), layout(3))
    assert len(_STREAMS) == before + 1
    del y
    gc.collect()
    assert len(_STREAMS) == before
    with torch.no_grad():
        with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), make_weights(3), layout(3))
    gc.collect()
    assert len(_STREAMS) == before


def test_a_loss_that_is_kept_keeps_no_buffers() -> None:
    y = with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), make_weights(3), layout(3)).sum()
    stream = max(_STREAMS.items())[1]
    assert stream.k is not None
    kept = [weakref.ref(x.untyped_storage()) for x in (stream.k, stream.v)]
    y.backward()
    gc.collect()
    assert y.grad_fn is not None and stream.grad_k is None and not any(storage() for storage in kept)


def test_writing_what_no_layer_reads_is_refused() -> None:
    stream = DepthStream(layout(2), "reference")
    q = torch.randn(1, 2, 2, 8)
    with pytest.raises(ValueError, match="kind 1 of layer 1 must have a slot"):
        depth_write(stream.start(), q, q, stream.layer_rows[1], FFN)


def test_layout_counts_slots() -> None:
    full = layout(36)
    assert full.n_slots == 70 and full.slots_read == 2 * sum(range(36))
    assert full.written_slot(35, ATTENTION) is None and full.written_slot(35, FFN) is None
    one = layout(4, window=1)  # only FFN slots are ever read
    assert [one.written_slot(layer, ATTENTION) for layer in range(4)] == [None] * 4
    assert [one.read_slots(layer) for layer in range(4)] == [(), (0,), (1,), (2,)]


def test_layout_numbers_only_what_is_read() -> None:
    picked = DepthLayout(((), (1,), (1, 2), (0, 2)))
    assert picked.n_layers == 4 and picked.n_slots == 3 and picked.slots_read == 5
    assert [picked.written_slot(layer, kind) for layer in range(4) for kind in (ATTENTION, FFN)] == [
        0, 1, 2, None, None, None, None, None,
    ]  # fmt: skip
    assert [picked.read_slots(layer) for layer in range(4)] == [(), (1,), (1, 2), (0, 2)]
    alone = DepthLayout(((), (0,)), kinds=1)
    assert alone.written_slot(0, ATTENTION) == 0 and alone.written_slot(0, FFN) is None
    assert hash(picked) == hash(DepthLayout(((), (1,), (1, 2), (0, 2)))) and picked != alone


def memory_rows(stream: DepthStream) -> int:
    """Rows ``[B, T, Hk, D]`` of keys and their gradients that a stream has allocated."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (stream.k, stream.grad_k) if x is not None
    }
    return sum(storages.values()) // (B * T * HK * D * 8)


@pytest.mark.parametrize(
    "case, training, evaluation",
    [
        (layout(9), 32, 16),
        (layout(9, window=4), 20, 4),
        (layout(9, kinds=1, window=1), 9, 1),
        (layout(9, choose=LISTS["first-and-last"]), 11, 2),
        (layout(9, window=6, choose=LISTS["every-second"]), 11, 3),
    ],
    ids=["all", "window", "one", "first-and-last", "dilated-window"],
)
def test_buffers_are_as_large_as_the_layout_needs(case: DepthLayout, training: int, evaluation: int) -> None:
    weights = make_weights(9)
    x = torch.randn(B, T, HQ * D, dtype=torch.float64)
    leaves = [w for layer in weights for w in layer]
    stream, other = DepthStream(case, "reference"), DepthStream(case, "reference")
    with torch.no_grad():
        evaluated = with_stream(x, weights, case, other)
    y, truth = with_stream(x, weights, case, stream), with_lists(x, weights, case)
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-13)
    torch.testing.assert_close(evaluated, truth, rtol=0, atol=1e-13)
    for a, b in zip(gradients(y, leaves), gradients(truth, leaves)):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=0, atol=1e-12)
    assert memory_rows(stream) == training == case.training.total
    assert memory_rows(other) == evaluation == len(set(case.rows))


@pytest.mark.parametrize("case", [p.values[0] for p in LAYOUTS], ids=[p.id for p in LAYOUTS])
def test_rows_are_used_again_only_when_nothing_needs_them(case: DepthLayout) -> None:
    written = {case.written_slot(layer, kind): layer for layer in range(case.n_layers) for kind in range(case.kinds)}
    readers = {s: [layer for layer in range(case.n_layers) if s in case.read_slots(layer)] for s in range(case.n_slots)}
    waiting = [{s for s in readers if written[s] < layer <= readers[s][-1]} for layer in range(case.n_layers)]
    for slots in waiting:  # what is written and still to be read when a layer reads
        assert len({case.rows[s] for s in slots}) == len(slots)
    rows, shift, total = case.training
    assert list(rows) == sorted(set(rows)) and total == max(rows, default=-1) + 1 + shift
    for layer, slots in enumerate(waiting if shift < case.n_slots else ()):
        keys = {rows[s] for s in readers if readers[s][0] <= layer}
        gradients = {rows[s] + shift for s in slots}  # those that exist once the layer's read has been differentiated
        assert not gradients & keys and len(gradients) == len(slots)


def test_a_backward_pass_over_a_pass_without_gradients_is_refused() -> None:
    case = layout(3, window=1)
    stream = DepthStream(case, "reference")
    with torch.no_grad():
        order = stream.start()
    q = torch.randn(1, 2, 2, 8, requires_grad=True)
    out, _ = depth_attention(q, q, q, order, stream.layer_rows[0])
    with pytest.raises(RuntimeError, match="began without gradients"):
        out.sum().backward()


def test_a_deep_layout_is_cheap() -> None:
    deep = layout(1000)
    start = time.process_time()
    for layer in range(1000):
        (
            deep.read_slots(layer),
            deep.written_slot(layer, FFN),
            deep.n_slots,
            deep.slots_read,
            deep.rows,
            deep.training,
        )
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (((),), "reads must have an entry per layer"),
        ((((), ()), 0), "kinds must be >= 1, got 0"),
        ((((), (1, 0)),), r"reads of layer 1 must be strictly increasing, got \(1, 0\)"),
        ((((), (0, 0)),), "reads of layer 1 must be strictly increasing"),
        ((((0,),),), r"reads of layer 0 must be candidates of the layers before it, 0 <= c < 0, got \(0,\)"),
        ((((), (0, 2)),), r"reads of layer 1 must be candidates of the layers before it, 0 <= c < 2"),
        ((((), (-1, 1)),), "reads of layer 1 must be candidates"),
        ((((), (0, 1)), 1), r"reads of layer 1 must be candidates of the layers before it, 0 <= c < 1"),
    ],
    ids=["empty", "kinds", "order", "twice", "own", "later", "negative", "no-ffn"],
)
def test_bad_layouts(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DepthLayout(*arguments)
