"""Losses and every gradient of a model in stages against the whole model, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode

from moda.config.model import ModelConfig
from moda.model.pipeline import Pipeline
from moda.model.stages import cut, make_stages
from tests.model.test_against_plain import DEPTH, SMALL, TOLERANCE, build
from tests.ranks import DEVICES, on_ranks

LISTED = [[], [0], [0, 3], [1, 2, 5], [0, 6], [1, 7, 8, 9]]
VARIANTS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "plain": ("reordered", None, {}),
    "all slots": ("post", DEPTH, {}),
    "all slots, untied": ("post", DEPTH, dict(tie_embeddings=False, pad_vocab_to=16)),
    "recent slots": ("post", {**DEPTH, "read": {"recent": 3}}, {}),
    "listed slots": ("pre", {**DEPTH, "read": {"listed": LISTED}}, {}),
    "packed documents": ("post", DEPTH, {}),
    "no FFN slots, reader": ("post", {**DEPTH, "ffn": False, "key_norm": "reader", "attention": "project"}, {}),
    "depth only": ("post", dict(mechanism="depth_only", **DEPTH), {}),
    "depth attention": ("post", dict(mechanism="depth_attention"), {}),
}
LAYERS = 6


def _microbatches(device: str, packed: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(5):
        ids, labels = (torch.randint(0, SMALL["vocab_size"], (2, 8), generator=generator) for _ in range(2))  # type: ignore[call-overload]
        labels[:, -1] = -100
        batches.append({"input_ids": ids.to(device), "labels": labels.to(device)})
        if packed:
            batches[-1] |= {"doc_lens": torch.tensor([[5, 3, 0], [2, 2, 4]]), "max_doc_lens": [5, 4]}
    return batches


OPTIONS: dict[str, Any] = dict(loss_reduction="sum", z_loss_multiplier=1e-2, return_logits=False)


def _compare(device: str) -> dict[str, dict[str, float]]:
    """For each variant, every tensor's error relative to its largest number, by all stages."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(ranks))) for _ in range(2)]
    errors: dict[str, dict[str, float]] = {}
    for name, (placement, depth, model) in VARIANTS.items():
        whole, part = (build(placement, depth, n_layers=LAYERS, **model).to(device) for _ in range(2))
        batches = _microbatches(device, name == "packed documents")
        losses = [whole(**b, **OPTIONS).loss for b in batches]
        torch.stack(losses).sum().backward()
        truth = {n: p.grad for n, p in whole.named_parameters()}

        if depth is not None:
            depth = {"mechanism": "moda", **depth}
        section = ModelConfig(norm_placement=placement, depth=depth, **{**SMALL, "n_layers": LAYERS, **model})  # type: ignore[arg-type]
        if name == "listed slots":
            part.apply_activation_checkpointing(TransformerActivationCheckpointingMode.full)
        cut(part, make_stages(section, ranks, SMALL["vocab_size"])[rank])  # type: ignore[arg-type]
        pipeline = Pipeline(part, groups[0], groups[1], torch.float64)
        got = pipeline.train(batches, **OPTIONS)
        if whole.tie_word_embeddings:
            pipeline.share_tied_gradient()
        mine = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in part.named_parameters()}
        assert mine.keys() <= truth.keys()
        found = {n: float((g - truth[n]).abs().max() / truth[n].abs().max().clamp(min=1.0)) for n, g in mine.items()}
        logits = pipeline.evaluate({"input_ids": batches[0]["input_ids"]})
        if part.lm_head is not None:
            found["loss"] = max(float((x.loss - y).abs() / y.abs()) for x, y in zip(got, losses, strict=True))
            with torch.no_grad():
                found["logits"] = float((logits - whole(batches[0]["input_ids"])).abs().max())
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, found)
        names = {*truth, "loss", "logits"}
        errors[name] = {n: max([each[n] for each in gathered if n in each], default=float("inf")) for n in names}
    return errors


@pytest.fixture(scope="module", params=[4, *DEVICES])
def errors(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    four = request.param == 4
    result: dict[str, dict[str, float]] = on_ranks(_compare, "cpu" if four else request.param, 4 if four else 2)
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_have_the_gradients_of_the_whole(name: str, errors: dict[str, dict[str, float]]) -> None:
    assert len(errors[name]) > 20
    assert {n: error for n, error in errors[name].items() if not error < TOLERANCE} == {}
