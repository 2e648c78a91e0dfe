"""The depth stream against autograd on a plain list of slots, in fp64, and its lifetime."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from moda_kernels import DepthLayout, DepthStream, moda_attention
from moda_kernels.depth_stream import _STREAMS, ATTENTION, FFN, depth_attention, depth_write

B, T, HQ, HK, D = 2, 5, 4, 2, 8
Weights = list[tuple[torch.Tensor, ...]]


def make_weights(n_layers: int) -> Weights:
    g = torch.Generator().manual_seed(0)

    def w(heads: int) -> torch.Tensor:
        return torch.randn(HQ * D, heads * D, generator=g, dtype=torch.float64).requires_grad_()

    return [(w(HQ), w(HK), w(HK), w(HK), w(HK)) for _ in range(n_layers)]


def heads(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w / HQ / D).unflatten(-1, (-1, D))


def with_stream(x: torch.Tensor, weights: Weights, layout: DepthLayout) -> torch.Tensor:
    stream = DepthStream(layout, "reference")
    token = stream.start()
    for layer, (wq, wk, wv, wfk, wfv) in enumerate(weights):
        control = stream.control[layer]
        q, k, v = heads(x, wq), heads(x, wk), heads(x, wv)
        out, token = depth_attention(q, k, v, token, control)
        if layout.written_slot(layer, ATTENTION) is not None:
            token = depth_write(token, k, v, control, ATTENTION)
        x = x + out.flatten(2).tanh()
        if layout.written_slot(layer, FFN) is not None:
            token = depth_write(token, heads(x, wfk), heads(x, wfv), control, FFN)
    return x


def with_lists(x: torch.Tensor, weights: Weights, ffn: bool, window: int | None) -> torch.Tensor:
    slots: list[tuple[torch.Tensor, torch.Tensor]] = []
    for wq, wk, wv, wfk, wfv in weights:
        q, k, v = heads(x, wq), heads(x, wk), heads(x, wv)
        seen = slots if window is None else slots[max(0, len(slots) - window) :]
        dk = torch.stack([s[0] for s in seen]) if seen else None
        dv = torch.stack([s[1] for s in seen]) if seen else None
        out: Any = moda_attention(q, k, v, dk, dv, backend="reference")
        slots.append((k, v))
        x = x + out.flatten(2).tanh()
        if ffn:
            slots.append((heads(x, wfk), heads(x, wfv)))
    return x


def gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True))


@pytest.mark.parametrize("window", [None, 1, 3], ids=lambda w: f"window={w}")
@pytest.mark.parametrize("ffn", [True, False], ids=["ffn", "no-ffn"])
def test_gradients_equal_autograd_on_a_list(ffn: bool, window: int | None) -> None:
    weights = make_weights(4)
    x = torch.randn(B, T, HQ * D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *(w for layer in weights for w in layer)]
    ours, truth = with_stream(x, weights, DepthLayout(4, ffn, window)), with_lists(x, weights, ffn, window)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    for a, b in zip(gradients(ours, leaves), gradients(truth, leaves)):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=0, atol=1e-12)


def test_two_forward_passes_alive_at_once() -> None:
    weights = make_weights(3)
    layout = DepthLayout(3)
    xs = [torch.randn(B, T, HQ * D, dtype=torch.float64) for _ in range(2)]
    leaves = [w for layer in weights for w in layer]
    ys = [with_stream(x, weights, layout) for x in xs]
    for y, x in reversed(list(zip(ys, xs))):
        for a, b in zip(gradients(y, leaves), gradients(with_lists(x, weights, True, None), leaves)):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-12)


def test_frozen_writers() -> None:
    weights = make_weights(3)
    for layer in weights[:2]:
        for w in layer:
            w.requires_grad_(False)
    leaves = [w for w in weights[2]][:3]
    x = torch.randn(B, T, HQ * D, dtype=torch.float64)
    ours = gradients(with_stream(x, weights, DepthLayout(3)), leaves)
    truth = gradients(with_lists(x, weights, True, None), leaves)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, truth) if a is not None and b is not None)


def test_evaluation_between_forward_and_backward() -> None:
    weights = make_weights(3)
    x = torch.randn(B, T, HQ * D, dtype=torch.float64)
    leaves = [w for layer in weights for w in layer]
    y = with_stream(x, weights, DepthLayout(3))
    with torch.no_grad():
        with_stream(x + 1, weights, DepthLayout(3))
    for a, b in zip(gradients(y, leaves), gradients(with_lists(x, weights, True, None), leaves)):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-12)


def test_a_second_backward_is_refused() -> None:
    weights = make_weights(2)
    y = with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), weights, DepthLayout(2)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice over one forward pass"):
        y.backward()


def test_reading_before_writing_is_refused() -> None:
    stream = DepthStream(DepthLayout(2), "reference")
    token = stream.start()
    q = torch.randn(1, 2, 2, 8)
    with pytest.raises(RuntimeError, match=r"slots \[0, 1\] are read before they are written"):
        depth_attention(q, q, q, token, stream.control[1])


def test_the_stream_lives_as_long_as_its_graph() -> None:
    gc.collect()
    before = len(_STREAMS)
    y = with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), make_weights(3), DepthLayout(3))
    assert len(_STREAMS) == before + 1
    del y
    gc.collect()
    assert len(_STREAMS) == before
    with torch.no_grad():
        with_stream(torch.randn(B, T, HQ * D, dtype=torch.float64), make_weights(3), DepthLayout(3))
    gc.collect()
    assert len(_STREAMS) == before


def test_layout_counts_slots() -> None:
    full = DepthLayout(36)
    assert full.n_slots == 70 and full.slots_read == 2 * sum(range(36))
    assert full.written_slot(35, ATTENTION) is None and full.written_slot(35, FFN) is None
    one = DepthLayout(4, window=1)  # only FFN slots are ever read
    assert [one.written_slot(layer, ATTENTION) for layer in range(4)] == [None] * 4
    assert [one.read_range(layer) for layer in range(4)] == [(0, 0), (0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("kwargs", [dict(n_layers=0), dict(n_layers=2, window=0)], ids=str)
def test_bad_layouts(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        DepthLayout(**kwargs)
