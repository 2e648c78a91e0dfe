"""Slots that cross from one depth stream to the next, against autograd on a plain list of slots."""

from __future__ import annotations

import pytest
import torch

from moda_kernels import (
    ATTENTION,
    FFN,
    DepthLayout,
    DepthStream,
    depth_attention,
    depth_write,
    receive_slots,
    send_slots,
)
from tests.kernels.layouts import LISTS, layout
from tests.kernels.test_deferred_flush import gradients, judge, parts, plain, toy

LAYOUTS = [
    pytest.param(layout(6), id="all"),
    pytest.param(layout(6, kinds=1), id="attention"),
    pytest.param(layout(6, window=2), id="window"),  # gradients in the rows of keys
    *(pytest.param(layout(5, choose=choose), id=name) for name, choose in LISTS.items()),
    pytest.param(DepthLayout(((), (1,), (0, 3), (1, 2, 5), (0, 2, 3, 7))), id="new-slots-between-old-ones"),
]


def in_stages(
    x: torch.Tensor, weights: list[torch.Tensor], whole: DepthLayout, step: int, backend: str = "reference"
) -> torch.Tensor:
    """The toy model of deferred flushes through several streams, ``step`` layers each."""
    slots = None
    for first in range(0, whole.n_layers, step):
        end = min(first + step, whole.n_layers)
        stream = DepthStream(whole.part(first, end), backend, defer=2)
        order = stream.start(x.device)
        if slots is not None:
            order = receive_slots(order, slots, stream, first)
        for layer in range(first, end):
            q, k, v, fk, fv = parts(x, weights[layer], 1, 16)
            row = stream.layer_rows[layer]
            out, order = depth_attention(q, k, v, order, row)
            for kind, pair in ((ATTENTION, (k, v)), (FFN, (fk, fv))):
                if whole.written_slot(layer, kind) is not None:
                    order = depth_write(order, *pair, row, kind)
            x = x + out.flatten(2)
        slots = send_slots(order, stream)
        assert (0 if slots is None else len(slots)) == 2 * len(whole.crossing(end))
    assert slots is None
    return x


@pytest.mark.parametrize("whole", LAYOUTS)
def test_gradients_equal_autograd_on_a_list(whole: DepthLayout) -> None:
    x, weights = toy(whole.n_layers)
    x, weights = x.double(), [w.double() for w in weights]
    truth = gradients(lambda x, w: plain(x, w, whole, 1, 16), x, weights)
    for step in (1, 2):
        ours = gradients(lambda x, w, step=step: in_stages(x, w, whole, step), x, weights)  # type: ignore[misc]
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("whole", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[-1]])
def test_with_gradients_that_are_added_later(whole: DepthLayout, poisoned: None) -> None:
    """The split backend, on the CPU in Triton's interpreter."""
    judge(lambda x, w: in_stages(x, w, whole, 3, "split"), lambda x, w: plain(x, w, whole, 1, 16), *toy(whole.n_layers))


def test_what_crosses_a_cut_is_bounded_by_the_policy() -> None:
    everything, recent = layout(12), layout(12, window=3)
    assert [len(everything.crossing(layer)) for layer in (0, 1, 6, 11, 12)] == [0, 2, 12, 22, 0]
    assert [len(recent.crossing(layer)) for layer in (0, 1, 6, 11, 12)] == [0, 2, 3, 3, 0]
    stage = recent.part(4, 8)
    assert stage.n_slots == 3 + 8 and stage.reads[-1] == recent.crossing(8) and not any(stage.reads[:4])


def test_a_gradient_that_nobody_takes_is_an_error() -> None:
    """The order of autograd is broken here: a slot is read by an order that did not write it."""
    stream = DepthStream(layout(2), "reference")
    start = stream.start()
    q, k = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(2))
    for kind in (ATTENTION, FFN):
        depth_write(start, k, k, stream.layer_rows[0], kind)
    out, _ = depth_attention(q, k, k, start, stream.layer_rows[1])
    with pytest.raises(RuntimeError, match=r"gradients of the rows \[0, 1\] were not taken"):
        out.sum().backward()


def test_slots_in_fp8_do_not_leave() -> None:
    eight = DepthLayout(layout(2).reads, quantised=True).part(0, 1)
    stream = DepthStream(eight, "reference")
    k = torch.randn(1, 3, 2, 8)
    order = depth_write(stream.start(), k, k, stream.layer_rows[0], ATTENTION)
    order = depth_write(order, k, k, stream.layer_rows[0], FFN)
    with pytest.raises(RuntimeError, match="slots in fp8 do not leave"):
        send_slots(order, stream)
