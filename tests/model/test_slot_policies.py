"""Slot policies: what the layers read, written out by hand, and the models that read it."""

from __future__ import annotations

from typing import Any

import pytest

from moda.config.model import ModelConfig
from moda.depth.read import SlotPolicy
from moda.errors import UserError
from moda.model import transformer_config
from tests.model.test_against_plain import DEPTH, SMALL, build, check

#: What each of five layers reads where layers can write two slots, attention and FFN: layer 2 can read slots 0 to 3.
READS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "all": ("all", ((), (0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6, 7))),
    "recent-1": ({"recent": 1}, ((), (1,), (3,), (5,), (7,))),
    "recent-3": ({"recent": 3}, ((), (0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7))),
    "first_recent": ({"first_recent": {"first": 1, "recent": 2}}, ((), (0, 1), (0, 2, 3), (0, 4, 5), (0, 6, 7))),
    "stride-3": ({"stride": 3}, ((), (0, 1), (0, 3), (0, 3, 5), (0, 3, 6, 7))),
    "attention": ({"kinds": ["attention"]}, ((), (0,), (0, 2), (0, 2, 4), (0, 2, 4, 6))),
    "ffn": ({"kinds": ["ffn"]}, ((), (1,), (1, 3), (1, 3, 5), (1, 3, 5, 7))),
    "blocks-2": ({"blocks": 2}, ((), (0, 1), (2, 3), (2, 3, 4, 5), (2, 3, 6, 7))),
    "union": ({"union": [{"stride": 4}, {"recent": 2}]}, ((), (0, 1), (0, 2, 3), (0, 4, 5), (0, 4, 6, 7))),
    "intersect": ({"intersect": [{"kinds": ["ffn"]}, {"recent": 4}]}, ((), (1,), (1, 3), (3, 5), (5, 7))),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["reuse", "project"])
@pytest.mark.parametrize("name", READS)
def test_logits_and_gradients(name: str, attention: str) -> None:
    read, expected = READS[name]
    policy = SlotPolicy.from_plain(read, "read")
    assert policy.reads(5, 2) == expected and policy.to_plain() == read
    # Every parameter must have a gradient: what no layer reads has none.
    net = build("post", {"mechanism": "moda", "attention": attention, "read": read}, n_layers=5)
    reads = {"reads": lambda layer, kinds: expected[layer]}
    check(net, "post", {**DEPTH, "attention": attention, **reads}, n_layers=5)


def test_policies_without_ffn_slots() -> None:
    one_kind = {
        "stride-3": ((), (0,), (0, 1), (0, 2), (0, 3)),
        "attention": ((), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)),
        "blocks-2": ((), (0,), (1,), (1, 2), (1, 3)),
        "recent-3": ((), (0,), (0, 1), (0, 1, 2), (1, 2, 3)),
    }
    for name, expected in one_kind.items():
        assert SlotPolicy.from_plain(READS[name][0], "read").reads(5, 1) == expected


def test_more_slots_than_there_are_is_all_of_them() -> None:
    every = READS["all"][1]
    for read in ({"recent": 99}, {"first_recent": {"first": 99, "recent": 1}}, {"stride": 1}, {"blocks": 1}):
        assert SlotPolicy.from_plain(read, "read").reads(5, 2) == every
    assert SlotPolicy.from_plain({"blocks": 99}, "read").reads(4, 2) == ((), (0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize("kind, writes", [("attention", "attention_slot"), ("ffn", "ffn_slot")])
def test_kinds_that_are_not_read_have_no_parameters(kind: str, writes: str) -> None:
    depth = {"mechanism": "moda", "attention": "project", "read": {"kinds": [kind]}}
    names = [n for n, _ in build("post", depth).named_parameters() if ".depth." in n]
    assert names == [f"blocks.{i}.depth.{writes}.w_{w}.weight" for i in range(3) for w in "kv"]
    config = transformer_config(ModelConfig(**SMALL, depth=depth))
    assert config.num_depth_params == 3 * 2 * 32 * 16


def test_a_policy_that_reads_nothing_is_refused() -> None:
    depth: dict[str, Any] = {"mechanism": "moda", "ffn": False, "read": {"kinds": ["ffn"]}}
    with pytest.raises(UserError, match="reads some slot, got .*there are no FFN slots: model.depth.ffn is false"):
        ModelConfig(**SMALL, depth=depth)
    apart = {"intersect": [{"kinds": ["attention"]}, {"recent": 1}]}
    with pytest.raises(UserError, match="model.depth.read: expected a policy that reads some slot"):
        ModelConfig(**SMALL, depth={"mechanism": "moda", "read": apart})
    ModelConfig(**{**SMALL, "n_layers": 1}, depth=depth)  # one layer has nothing to read
