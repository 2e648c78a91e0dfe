"""Losses and every gradient of a model in stages against the whole model, in fp64."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode

from moda.config.model import ModelConfig
from moda.model.pipeline import Pipeline, turns
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
    "learned slots": ("post", {**DEPTH, "read": {"learned": 2}}, {}),
    "packed documents": ("post", DEPTH, {}),
    "no FFN slots, reader": ("post", {**DEPTH, "ffn": False, "key_norm": "reader", "attention": "project"}, {}),
    "depth only": ("post", dict(mechanism="depth_only", **DEPTH), {}),
    "depth attention": ("post", dict(mechanism="depth_attention"), {}),
}
LAYERS = 6


def _microbatches(device: str, count: int, packed: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        ids, labels = (torch.randint(0, SMALL["vocab_size"], (2, 8), generator=generator) for _ in range(2))  # type: ignore[call-overload]
        labels[:, -1] = -100
        batches.append({"input_ids": ids.to(device), "labels": labels.to(device)})
        if packed:
            batches[-1] |= {"doc_lens": torch.tensor([[5, 3, 0], [2, 2, 4]]), "max_doc_lens": [5, 4]}
    return batches


OPTIONS: dict[str, Any] = dict(loss_reduction="sum", z_loss_multiplier=1e-2, return_logits=False)


def _compare(device: str, per_rank: int = 1) -> dict[str, dict[str, float]]:
    """For each variant, every tensor's error relative to its largest number, by all stages."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(ranks))) for _ in range(2 if per_rank == 1 else 4)]
    errors: dict[str, dict[str, float]] = {}
    for name, (placement, depth, model) in VARIANTS.items():
        whole, *parts = (build(placement, depth, n_layers=LAYERS, **model).to(device) for _ in range(1 + per_rank))
        batches = _microbatches(device, 5 if per_rank == 1 else 4, name == "packed documents")
        losses = [whole(**b, **OPTIONS).loss for b in batches]
        torch.stack(losses).sum().backward()
        truth = {n: p.grad for n, p in whole.named_parameters()}

        if depth is not None:
            depth = {"mechanism": "moda", **depth}
        section = ModelConfig(norm_placement=placement, depth=depth, **{**SMALL, "n_layers": LAYERS, **model})  # type: ignore[arg-type]
        stages = make_stages(section, ranks, SMALL["vocab_size"], per_rank)  # type: ignore[arg-type]
        for part, stage in zip(parts, stages[rank::ranks], strict=True):
            if name == "listed slots":
                part.apply_activation_checkpointing(TransformerActivationCheckpointingMode.full)
            cut(part, stage)
        pipeline = Pipeline(parts, groups, torch.float64)
        got = pipeline.train(batches, **OPTIONS)
        if whole.tie_word_embeddings:
            pipeline.share_tied_gradient()
        mine = {
            n.replace("_checkpoint_wrapped_module.", ""): p.grad for part in parts for n, p in part.named_parameters()
        }
        assert mine.keys() <= truth.keys()
        found = {n: float((g - truth[n]).abs().max() / truth[n].abs().max().clamp(min=1.0)) for n, g in mine.items()}
        logits = pipeline.evaluate({"input_ids": batches[0]["input_ids"]})
        if parts[-1].lm_head is not None:
            found["loss"] = max(float((x.loss - y).abs() / y.abs()) for x, y in zip(got, losses, strict=True))
            with torch.no_grad():
                found["logits"] = float((logits - whole(batches[0]["input_ids"])).abs().max())
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, found)
        names = {*truth, "loss", "logits"}
        errors[name] = {n: max([each[n] for each in gathered if n in each], default=float("inf")) for n in names}
    return errors


@pytest.fixture(scope="module", params=["four ranks", "three stages each", *DEVICES])
def errors(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    kind = request.param
    device = "cuda" if kind == "cuda" else "cpu"
    compare = functools.partial(_compare, per_rank=3) if kind == "three stages each" else _compare
    result: dict[str, dict[str, float]] = on_ranks(compare, device, 4 if kind == "four ranks" else 2)
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_have_the_gradients_of_the_whole(name: str, errors: dict[str, dict[str, float]]) -> None:
    assert len(errors[name]) > 20
    assert {n: error for n, error in errors[name].items() if not error < TOLERANCE} == {}


def test_what_is_sent_is_bounded() -> None:
    """With one stage per rank by the policy; with several by what the next rank has not been sent before."""
    depth = {"mechanism": "moda", **DEPTH}
    everything, recent = (
        ModelConfig(depth={**depth, "read": read}, **{**SMALL, "n_layers": 12})  # type: ignore[arg-type]
        for read in ("all", {"recent": 3})
    )
    assert [len(s.sent) for s in make_stages(everything, 4, 0)] == [6, 12, 18, 0]
    assert [len(s.sent) for s in make_stages(recent, 4, 0)] == [3, 3, 3, 0]
    several = make_stages(everything, 4, 0, per_rank=3)  # a layer each: two slots
    assert [len(s.sent) for s in several] == [2, 4, *[6] * 9, 0]
    assert [len(s.leaving) for s in several] == [*range(2, 24, 2), 0]
    assert [len(s.kept) for s in several] == [*range(2, 18, 2), *[0] * 4]
    assert all(s.received == before.sent for before, s in zip(several, several[1:]))


@pytest.mark.parametrize("ranks, parts", itertools.product((1, 2, 3, 4), (1, 2, 3)))
def test_no_turn_waits_for_one_that_waits_for_it(ranks: int, parts: int) -> None:
    """Every rank takes its turns in order; each needs that of the stage before (forward) or after (backward)."""
    last = ranks * parts - 1
    for count in {ranks, 2 * ranks, 4 * ranks} | ({1, 5} if parts == 1 else set()):
        waiting = [list(turns(rank, ranks, parts, count)) for rank in range(ranks)]
        assert all(len({*each}) == len(each) == 2 * parts * count for each in waiting)
        done: set[tuple[bool, int, int]] = set()
        while any(waiting):
            ready = []
            for rank, each in enumerate(waiting):
                forward, part, i = each[0] if each else (True, -1, -1)
                stage = part * ranks + rank
                needs = (True, stage - 1, i) if forward and stage else (False, stage + 1, i)
                if not forward and stage == last:
                    needs = (True, last, i)
                if each and (forward and stage == 0 or needs in done):
                    ready.append((rank, (forward, stage, i)))
            assert ready, (count, waiting)
            for rank, turn in ready:
                done.add(turn)
                waiting[rank].pop(0)
