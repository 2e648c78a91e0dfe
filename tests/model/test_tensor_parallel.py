"""Losses and every gradient of a model split over two ranks against the whole model, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from olmo_core.nn import lm_head
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.model.test_against_plain import DEPTH, SMALL, TOLERANCE, build
from tests.ranks import DEVICES, on_ranks

READER = {**DEPTH, "key_norm": "reader", "attention": "project"}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "moda": ("post", DEPTH, {}),
    "moda, head norm": ("reordered", DEPTH, dict(qk_norm="head")),
    "moda, no norm": ("pre", {**DEPTH, "key_norm": "none"}, dict(qk_norm="none")),
    "moda, reader, projected": ("post", READER, {}),
    "moda, reader, unrotated, head norm": ("post", {**READER, "rope": "none"}, dict(qk_norm="head")),
    "moda, value norm, bias, peri": ("peri", {**DEPTH, "value_norm": True}, dict(bias=True)),
    "moda, padded": ("post", DEPTH, dict(pad_vocab_to=16, tie_embeddings=False)),
    "moda, learned": ("post", {**DEPTH, "read": {"learned": 2}}, {}),
    "value residual": ("reordered", dict(mechanism="value_residual"), {}),
    "depth only": ("post", dict(mechanism="depth_only", **DEPTH), {}),
    "depth attention": ("post", dict(mechanism="depth_attention"), {}),
}


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int, z_loss_multiplier: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """OLMo-core's loss, which computes in fp32 whatever it is given."""
    z = logits.logsumexp(-1).square()[labels != ignore_index].sum()
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum"), z_loss_multiplier * z


def _full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _run(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids, labels = (torch.randint(0, SMALL["vocab_size"], (2, 8), generator=generator) for _ in range(2))  # type: ignore[call-overload]
    labels[:, -1] = -100
    device = next(net.parameters()).device
    ids, labels = ids.to(device), labels.to(device)
    net.train()
    loss = net(ids, labels=labels, loss_reduction="sum", z_loss_multiplier=1e-2, return_logits=False).loss
    loss.backward()
    return {"loss": _full(loss.detach()), **{n: _full(p.grad) for n, p in net.named_parameters() if p.grad is not None}}


def _compare(device: str) -> dict[str, dict[str, float]]:
    """For each variant, every tensor's error relative to its largest number."""
    lm_head.cross_entropy_loss = _cross_entropy  # type: ignore[assignment]
    mesh = init_device_mesh(device, (2,))
    errors: dict[str, dict[str, float]] = {}
    for name, (placement, depth, model) in VARIANTS.items():
        whole, split = (build(placement, depth, **model).to(device) for _ in range(2))
        split.apply_tp(mesh)
        truth, got = _run(whole), _run(split)
        missing = dict.fromkeys(truth.keys() ^ got.keys(), float("inf"))
        errors[name] = missing | {
            n: float((got[n] - t).abs().max() / t.abs().max().clamp(min=1.0)) for n, t in truth.items() if n in got
        }
    return errors


@pytest.fixture(scope="module", params=DEVICES)
def errors(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = on_ranks(_compare, request.param)
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_have_the_gradients_of_one(name: str, errors: dict[str, dict[str, float]]) -> None:
    assert len(errors[name]) > 20
    assert {n: error for n, error in errors[name].items() if not error < TOLERANCE} == {}
