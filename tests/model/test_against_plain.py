"""Logits and every gradient of the model against a plain list-of-slots implementation, in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode as Mode

from moda.config.model import ModelConfig
from moda.model import transformer_config
from moda.placements import NormPlacement
from tests.plain_model import PLACEMENTS, PlainDecoder

SMALL = dict(d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, ffn_hidden_size=48, vocab_size=61)
DEPTH = dict(attention="reuse", ffn=True, key_norm="writer", rope="same_position")
TOLERANCE = 1e-11  # fp64; the rotation's angles are fp32 on both sides


def build(placement: str, depth: dict | None, **model: object) -> torch.nn.Module:
    if depth is not None and "mechanism" not in depth:
        depth = {"mechanism": "moda", **depth}
    config = ModelConfig(norm_placement=placement, depth=depth, **{**SMALL, **model})
    net = transformer_config(config).build(init_device="cpu").double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    for module in net.modules():  # norms and rotations compute in fp32 unless told otherwise
        if hasattr(module, "full_precision"):
            module.full_precision = False
    return net


def check(
    net: torch.nn.Module,
    placement: str,
    depth: dict | None,
    head_norm: bool = False,
    n_kv_heads: int = 2,
    **other: Any,
) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 7), generator=generator)
    logits = net(ids)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * weights).sum().backward()

    params = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in net.named_parameters(remove_duplicate=False)}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    if net.tie_word_embeddings:
        leaves["lm_head.w_out.weight"] = leaves["embeddings.weight"]
    shape = {**{k: SMALL[k] for k in ("n_layers", "n_heads", "head_dim")}, "n_kv_heads": n_kv_heads}
    if "n_layers" in other:
        shape["n_layers"] = other.pop("n_layers")
    decoder = PlainDecoder(leaves, placement=placement, head_norm=head_norm, depth=depth, **shape, **other)
    plain = decoder.logits(ids)
    (plain * weights).sum().backward()

    assert (logits - plain).abs().max() < TOLERANCE * plain.abs().max()
    for name, p in params.items():
        truth = leaves[name].grad
        assert p.grad is not None and truth is not None, name
        assert (p.grad - truth).abs().max() <= TOLERANCE * truth.abs().max().clamp(min=1.0), name


VARIANTS = [
    dict(attention=a, ffn=f, key_norm=n, rope=r)
    for a, f, n, r in itertools.product(
        ("reuse", "project"), (True, False), ("writer", "reader", "none"), ("same_position", "none")
    )
] + [{**DEPTH, "value_norm": True}, {**DEPTH, "value_norm": True, "attention": "project", "rope": "none"}]


def variant_id(v: object) -> str:
    return "-".join(f"{x}" for x in v.values()) if isinstance(v, dict) else str(v)


@pytest.mark.parametrize("qk_norm", ["full", "head"])
@pytest.mark.parametrize("depth", VARIANTS, ids=variant_id)
def test_every_depth_variant(depth: dict, qk_norm: str) -> None:
    check(build("post", depth, qk_norm=qk_norm), "post", depth, head_norm=qk_norm == "head")


@pytest.mark.parametrize("depth", [None, DEPTH], ids=["plain", "depth"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norm_placements(placement: str, depth: dict | None) -> None:
    check(build(placement, depth), placement, depth)


def test_every_placement_has_its_formula() -> None:
    assert set(PLACEMENTS) == set(NormPlacement.known)


@pytest.mark.parametrize("model", [dict(bias=True), dict(tie_embeddings=False), dict(n_kv_heads=4)], ids=variant_id)
def test_other_settings(model: dict) -> None:
    check(build("reordered", DEPTH, **model), "reordered", DEPTH, n_kv_heads=model.get("n_kv_heads", 2))


OTHERS = [
    dict(mechanism="value_residual"),
    dict(mechanism="denseformer"),
    dict(mechanism="denseformer", dilation=2),
    dict(mechanism="denseformer", dilation=3),
    dict(mechanism="depth_attention"),
    dict(mechanism="depth_attention", stride=3, recent=1),
]


def other_options(depth: dict) -> dict[str, Any]:
    options = {"stride": SMALL["n_layers"] // 2} if depth["mechanism"] == "depth_attention" else {}
    return {**options, **{("other" if k == "mechanism" else k): v for k, v in depth.items()}}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("depth", OTHERS, ids=variant_id)
def test_other_mechanisms(depth: dict, placement: str) -> None:
    check(build(placement, depth), placement, None, **other_options(depth))


CHECKPOINTING = [
    dict(mode=Mode.full),
    dict(mode=Mode.selected_blocks, block_interval=2),
    dict(mode=Mode.selected_modules, modules=["blocks.*.feed_forward"]),
    dict(mode=Mode.selected_modules, modules=["blocks.*.attention"]),
    dict(mode=Mode.selected_modules, modules=["blocks.*.w_*"]),
    dict(mode=Mode.selected_ops),
]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_depth_under_a_softmax_of_its_own(placement: str) -> None:
    apart = {**DEPTH, "apart": True}
    check(build(placement, {"mechanism": "depth_only"}), placement, apart)


@pytest.mark.parametrize(
    "variant, reads, top",
    [
        (dict(key_norm="reader", rope="none", attention="project"), "all", None),
        (dict(key_norm="reader", ffn=False), {"recent": 1}, None),
        (dict(key_norm="none"), {"dynamic": 2}, 2),
        (dict(), {"learned": 2}, None),
    ],
    ids=["reader", "window", "dynamic", "learned"],
)
def test_variants_of_a_softmax_of_its_own(variant: dict, reads: Any, top: int | None) -> None:
    net = build("post", {"mechanism": "depth_only", "read": reads, **variant})
    plain = {**DEPTH, "apart": True, **variant, "top": top}
    if reads == {"recent": 1}:
        plain["reads"] = lambda layer, kinds: range(max(0, layer - 1), layer)
    check(net, "post", plain)


CHECKPOINTED = [*OTHERS[:2], OTHERS[4], dict(mechanism="depth_only")]


@pytest.mark.parametrize("depth", [DEPTH, *CHECKPOINTED], ids=lambda d: d.get("mechanism", "moda"))
@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=variant_id)
def test_activation_checkpointing(checkpointing: dict, depth: dict) -> None:
    net = build("post", depth)
    net.apply_activation_checkpointing(**checkpointing)
    for block in net.blocks.values():
        # As init_weights does: selected_ops counts the ops of a block, first use included.
        block.attention.rope.warmup_cache(16, torch.device("cpu"))
    calls = []
    net.blocks["1"].attention.q_norm.register_forward_hook(lambda *_: calls.append(1))
    plain: tuple[Any, dict] = (None, other_options(depth)) if "mechanism" in depth else (depth, {})
    if depth.get("mechanism") == "depth_only":
        plain = {**DEPTH, "apart": True}, {}
    check(net, "post", plain[0], **plain[1])
    again = checkpointing["mode"] == Mode.full or "blocks.*.attention" in checkpointing.get("modules", ())
    if checkpointing["mode"] in (Mode.full, Mode.selected_modules):
        assert len(calls) == 1 + again  # what is checkpointed runs once more in the backward pass
