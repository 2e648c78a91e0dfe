"""Losses and every gradient of a model whose ranks share the tokens against one rank, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from olmo_core.train.train_module import TransformerContextParallelConfig
from torch.distributed import init_device_mesh

from moda.model.attention import use_operator
from tests.model.test_against_plain import DEPTH, SMALL, TOLERANCE, build
from tests.ranks import DEVICES, on_ranks

VARIANTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "default": (DEPTH, {}),
    "reader, unrotated, projected": ({**DEPTH, "key_norm": "reader", "rope": "none", "attention": "project"}, {}),
    "learned": ({**DEPTH, "read": {"learned": 2}}, {}),
    "recent slots, head norm": ({**DEPTH, "read": {"recent": 3}}, dict(qk_norm="head", n_kv_heads=4)),
}


def _run(net: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    device = next(net.parameters()).device
    (net(ids.to(device)) * weights.to(device)).sum().backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def _compare(device: str) -> dict[str, dict[str, float]]:
    """For each variant, every gradient's error relative to its largest number."""
    mesh, ring = init_device_mesh(device, (dist.get_world_size(),)), TransformerContextParallelConfig.zig_zag(2).ring
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 24), generator=generator)  # type: ignore[call-overload]
    weights = torch.randn(2, 24, SMALL["vocab_size"], generator=generator, dtype=torch.float64)  # type: ignore[call-overload]
    errors: dict[str, dict[str, float]] = {}
    for name, (depth, model) in VARIANTS.items():
        # The truth stays on the CPU: ranks get their part of RoPE's fp32 tables from there, whose last bit is the device's own.
        whole, split = build("post", depth, **model), build("post", depth, **model).to(device)
        if depth is None:
            for block in split.blocks.values():
                use_operator(block.attention, "auto", always=True)
        split.apply_cp(mesh, ring=ring)
        (part,) = split._cp_load_balancer.batch_shard(inputs=[weights], seq_dims=[1])
        truth, got = _run(whole, ids, weights), _run(split, ids, part)
        for grad in got.values():
            dist.all_reduce(grad)
        got = {n: grad.cpu() for n, grad in got.items()}
        errors[name] = dict.fromkeys(truth.keys() ^ got.keys(), float("inf"))
        errors[name] |= {n: float((got[n] - t).abs().max() / t.abs().max().clamp(min=1.0)) for n, t in truth.items()}
    return errors


@pytest.fixture(scope="module", params=[3, *DEVICES])
def errors(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    three = request.param == 3
    result: dict[str, dict[str, float]] = on_ranks(_compare, "cpu" if three else request.param, 3 if three else 2)
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_have_the_gradients_of_one(name: str, errors: dict[str, dict[str, float]]) -> None:
    depth, model = VARIANTS[name]
    assert errors[name].keys() == dict(build("post", depth, **model).named_parameters()).keys()
    assert {n: error for n, error in errors[name].items() if not error < TOLERANCE} == {}
