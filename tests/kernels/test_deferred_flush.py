"""Depth streams on the split backend: deferred and immediate gradients against plain autograd on a list of slots, and compiled.

The toy model has a layer's parts without its matrices: queries, keys and values are elementwise functions of the residual stream,
so that a slot's gradient reaches every earlier layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moda_kernels import DepthLayout, DepthStream
from moda_kernels.depth_stream import ATTENTION, FFN, depth_attention, depth_write
from moda_kernels.yardstick import report, verdicts

pytest.importorskip("triton")

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


def plain(x: torch.Tensor, weights: list[torch.Tensor], layout: DepthLayout, hk: int, d: int) -> torch.Tensor:
    """The toy model on a list of slots, in x's dtype."""
    slots: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, w in enumerate(weights):
        q, k, v, fk, fv = parts(x, w, hk, d)
        group = q.shape[2] // hk
        k_, v_ = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        logits = torch.einsum("bthd,bshd->bhts", q, k_) * d**-0.5
        T = q.shape[1]
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
        lo, hi = layout.read_range(layer)
        read = slots[lo:hi]
        if read:
            dk = torch.stack([s[0] for s in read]).repeat_interleave(group, 3)
            dv = torch.stack([s[1] for s in read]).repeat_interleave(group, 3)
            logits = torch.cat([logits, torch.einsum("bthd,sbthd->bhts", q, dk) * d**-0.5], dim=-1)
        p = logits.softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", p[..., :T], v_)
        if read:
            out = out + torch.einsum("bhts,sbthd->bthd", p[..., T:], dv)
        for kind, pair in ((ATTENTION, (k, v)), (FFN, (fk, fv))):
            if layout.written_slot(layer, kind) is not None:
                slots.append(pair)
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
    token = stream.start(x.device)

    def run(x: torch.Tensor, token: torch.Tensor, w: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, fk, fv = parts(x, w, hk, d)
        control = stream.control[layer]
        out, token = depth_attention(q, k, v, token, control)
        for kind, pair in ((ATTENTION, (k, v)), (FFN, (fk, fv))):
            if layout.written_slot(layer, kind) is not None:
                token = depth_write(token, *pair, control, kind)
        return x + out.flatten(2), token

    for layer, w in enumerate(weights):
        x, token = run(x, token, w, layer) if wrap is None else wrap(run, x, token, w, layer)
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
    pytest.param(
        DepthLayout(n, ffn=ffn, window=window), defer, id=f"L{n}-{'ffn' if ffn else 'attn'}-w{window}-b{defer}"
    )
    for n, ffn, window, defer in (
        (1, True, None, 4),
        (2, True, None, 8),
        (5, True, None, 1),
        (6, True, None, 2),
        (7, True, None, 3),
        (5, False, None, 3),
        (6, True, 3, 4),
        (7, False, 2, 3),
    )
]


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
    layout = DepthLayout(5)
    x, weights = toy(5)

    def run(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
        def again(*args: Any) -> Any:
            return checkpoint(*args, use_reentrant=False)

        first = streamed(x, w, DepthStream(layout, "split", defer=defer), 1, 16, again)
        second = streamed(x * 0.5, w, DepthStream(layout, "split", defer=defer), 1, 16)
        return first + second

    judge(run, lambda x, w: plain(x, w, layout, 1, 16) + plain(x * 0.5, w, layout, 1, 16), x, weights)


def test_every_layer_and_slot_is_flushed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is flushed is what is owed: each (layer, slot) pair exactly once and before it is taken, for any layout and any b."""
    backward = importlib.import_module("moda_kernels.moda_attention.depth_backward")
    for layout in (DepthLayout(9), DepthLayout(9, ffn=False), DepthLayout(9, window=5), DepthLayout(8, window=1)):
        for defer in (2, 3, 8, 20):
            pairs: list[tuple[int, int]] = []
            stream = DepthStream(layout, "split", defer=defer)
            stream.k = stream.v = torch.zeros(layout.n_slots, 1, 1, 1, 8)
            kept: list[int] = []

            def flush(pending: Any, layers: Any, slots: Any, *rest: Any) -> None:
                pairs.extend((kept[m], s) for m in range(*layers) for s in range(*slots))  # noqa: B023

            monkeypatch.setattr(backward, "flush", flush)
            for layer in reversed(range(layout.n_layers)):
                for kind in (FFN, ATTENTION):
                    slot = layout.written_slot(layer, kind)
                    if slot is not None:
                        stream.take_gradient(slot)
                        readers = {m for m in range(layout.n_layers) if slot in range(*layout.read_range(m))}
                        assert {m for m, s in pairs if s == slot} == readers
                lo, hi = layout.read_range(layer)
                if lo < hi:
                    if stream.keep(lo, hi, torch.zeros(1, 1, 1, 8)).at == 0:
                        kept.clear()
                    kept.append(layer)
            assert len(pairs) == len(set(pairs)) == layout.slots_read


def test_defer_must_be_positive() -> None:
    with pytest.raises(ValueError, match="defer must be >= 1, got 0"):
        DepthStream(DepthLayout(2), defer=0)


def compiled_graphs(n_layers: int) -> int:
    """How many graphs per-layer ``torch.compile`` makes of the toy model (without breaks)."""
    layout = DepthLayout(n_layers)
    x, weights = toy(n_layers)
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def layer(x: torch.Tensor, token: torch.Tensor, w: torch.Tensor, control: torch.Tensor, last: bool) -> Any:
        q, k, v, fk, fv = parts(x, w, 1, 16)
        out, token = depth_attention(q, k, v, token, control)
        if not last:
            token = depth_write(token, k, v, control, ATTENTION)
            token = depth_write(token, fk, fv, control, FFN)
        return x + out.flatten(2), token

    torch._dynamo.reset()
    run = torch.compile(layer, backend=backend, fullgraph=True)

    def model(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
        stream = DepthStream(layout, "split", defer=2)
        token = stream.start(x.device)
        for i, weight in enumerate(w):
            x, token = run(x, token, weight, stream.control[i], i == n_layers - 1)
        return x

    for _ in range(2):
        judge(model, lambda x, w: plain(x, w, layout, 1, 16), x, weights)
    return graphs


def test_graphs_do_not_grow_with_the_layers() -> None:
    assert compiled_graphs(3) == compiled_graphs(7)


@pytest.mark.gpu
@pytest.mark.parametrize("defer", (1, 2, 8))
def test_stream_at_size(defer: int) -> None:
    layout = DepthLayout(12)
    x, weights = toy(12, T=260, hk=4, group=2, d=64)
    judge(
        lambda x, w: streamed(x, w, DepthStream(layout, "split", defer=defer), 4, 64),
        lambda x, w: plain(x, w, layout, 4, 64),
        x,
        weights,
    )
