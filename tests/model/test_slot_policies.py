"""Slot policies: what the layers read, written out by hand, and the models that read it."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode as Mode

from moda.config.model import ModelConfig
from moda.depth import MoDA
from moda.depth.read import Kinds, Learned, SlotPolicy
from moda.errors import UserError
from moda.model import transformer, transformer_config
from moda.train.memory import slots_memory
from moda_kernels import DepthStream, available_backends
from moda_kernels.moda_attention import Inputs, get_backend, make_problem
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
    "dynamic": ({"dynamic": {"top": 2, "of": {"recent": 3}}}, ((), (0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7))),
    "learned": ({"learned": {"top": 2, "of": {"recent": 3}}}, ((), (0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7))),
    "learned-all": (
        {"learned": {"top": 1, "of": "all"}},
        ((), (0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6, 7)),
    ),
    "listed": ({"listed": [[], [1], [0, 3], [], [2, 3, 6]]}, ((), (1,), (0, 3), (), (2, 3, 6))),
    "intersect": ({"intersect": [{"kinds": ["ffn"]}, {"recent": 4}]}, ((), (1,), (1, 3), (3, 5), (5, 7))),
}  # fmt: skip


@pytest.mark.parametrize("attention, slot_dtype", [("reuse", None), ("project", None), ("reuse", "fp8")])
@pytest.mark.parametrize("name", READS)
def test_logits_and_gradients(name: str, attention: str, slot_dtype: str | None) -> None:
    read, expected = READS[name]
    policy = SlotPolicy.from_plain(read, "read")
    assert policy.reads(5, 2) == expected and policy.to_plain() == read
    # Every parameter must have a gradient: what no layer reads has none.
    options = {"attention": attention, "read": read, "slot_dtype": slot_dtype}
    net = build("post", {"mechanism": "moda", **options}, n_layers=5)
    reads = {"reads": lambda layer, kinds: expected[layer], "top": policy.kept, "fp8": slot_dtype is not None}
    check(net, "post", {**DEPTH, "attention": attention, **reads}, n_layers=5)


#: Rows of keys with their gradients in training, and of keys in evaluation, of the five layers above.
ROWS = {
    "all": (16, 8), "recent-1": (5, 1), "recent-3": (11, 3), "first_recent": (11, 3), "stride-3": (12, 4), "attention": (8, 4),
    "ffn": (8, 4), "blocks-2": (12, 4), "union": (12, 4), "intersect": (6, 2), "dynamic": (11, 3),
    "listed": (10, 3), "learned": (11, 3), "learned-all": (16, 8),
}  # fmt: skip


@pytest.mark.parametrize("name, slot_dtype", [*((name, None) for name in READS), ("all", "fp8"), ("recent-3", "fp8")])
def test_the_planner_tells_the_memory_of_the_slots(
    name: str, slot_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(stream: DepthStream) -> int:
        names = ("k", "v", "scale_k", "scale_v", "grad_k", "grad_v")
        tensors = [x.untyped_storage() for n in names if (x := getattr(stream, n)) is not None]
        return sum({x.data_ptr(): x.nbytes() for x in tensors}.values())

    streams: list[Kept] = []

    class Kept(DepthStream):
        """Whose size stays known when the backward pass has let go of the buffers."""

        had = 0

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streams.append(self)

        def release(self) -> None:
            self.had = size(self)
            super().release()

    monkeypatch.setattr(transformer, "DepthStream", Kept)
    net = build("post", {"mechanism": "moda", "read": READS[name][0], "slot_dtype": slot_dtype}, n_layers=5)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 7))
    logits = net(ids)
    with torch.no_grad():
        torch.testing.assert_close(net(ids), logits, rtol=0, atol=1e-9)
    logits.sum().backward()

    training, evaluation = ROWS[name]
    row = 2 * 8 * 14 * 2 * 8  # keys and values, bytes of a number, tokens, Hk, D
    expected = [training * row, evaluation * row]
    # Rows of fp8: 8 slots of keys and 8 of gradients, whatever is read; a row of 8 numbers has 8 + 4 bytes.
    if slot_dtype is not None:
        expected = [8 * (row + row * 12 // 64), evaluation * row * 12 // 64]
    assert [stream.had or size(stream) for stream in streams] == expected and not size(streams[0])
    planned = [n for part in slots_memory(net.config, 14, 8, gpu=False) for n in part.values()]
    assert sum(planned) == expected[0]
    model = net.config.model
    label, told = model.depth.describe(model)[2]
    assert label == "rows of the depth buffers" and told.endswith(f"; in evaluation {evaluation}")
    if slot_dtype is not None:
        bytes_read = 2 * sum(map(len, READS[name][1])) * 2 * (8 + 4)
        assert model.depth.describe(model)[3] == ("slot bytes read per token (fp8)", f"{bytes_read:,}")


def test_dynamic_is_refused_where_it_cannot_run() -> None:
    depth: dict[str, Any] = {"mechanism": "moda", "read": {"dynamic": 2}}
    for backend in ("fused", "split"):
        with pytest.raises(UserError, match="model.attention_backend: expected auto or reference with .*dynamic, got"):
            ModelConfig(**SMALL, depth=depth, attention_backend=backend)
        q = torch.zeros(1, 1, 1, 8)
        kind = make_problem(Inputs(q, q, q), depth_top=2).kind
        if backend in available_backends():
            with pytest.raises(ValueError, match="depth_top: only the reference backend"):
                get_backend(backend, kind)
    every = ModelConfig(**SMALL, depth=depth).depth
    assert isinstance(every, MoDA)
    assert every.read.to_plain() == {"dynamic": {"top": 2, "of": "all"}}
    # Keys of 2 + 4 + 6 slots, values of 2 + 2 + 2; 4 heads of 8.
    assert every.forward_flops_per_token(ModelConfig(**SMALL)) == 2 * 32 * (12 + 6)
    for inner, words in (
        ({"union": ["all", {"dynamic": 2}]}, "model.depth.read.union: expected policies that are not dynamic"),
        ({"dynamic": {"top": 2, "of": {"dynamic": 2}}}, "model.depth.read.dynamic.of: expected a policy that is not"),
        ({"dynamic": {"top": 2, "of": {"learned": 2}}}, "model.depth.read.dynamic.of: expected a policy that is not"),
        ({"learned": {"top": 2, "of": {"dynamic": 2}}}, "model.depth.read.learned.of: expected a policy that is not"),
        ({"intersect": ["all", {"learned": 2}]}, r"policies that are not learned \(write {learned: {top: S, of: {inte"),
        ({"dynamic": 0}, "model.depth.read.dynamic.top: expected an integer >= 1, got 0"),
    ):
        with pytest.raises(UserError, match=words):
            SlotPolicy.from_plain(inner, "model.depth.read")


def test_learned_keeps_the_largest_scores() -> None:
    policy = SlotPolicy.from_plain({"learned": 2}, "read")
    assert isinstance(policy, Learned) and policy.to_plain() == {"learned": {"top": 2, "of": "all"}}
    scores = [
        [],
        [0.5, -1.0, 9.0],
        [0.0, 0.0, 0.0, 0.0],
        [-1.0, 3.0, 0.0, 3.0, 2.0, 3.0],
    ]  # ties: the most recent slots
    assert policy.choose(scores, 2).reads(4, 2) == ((), (0, 1), (2, 3), (3, 5))
    assert Learned(1).choose(scores, 2).layers == ((), (0,), (3,), (5,))
    assert Learned(99).choose(scores, 2).reads(4, 2) == READS["all"][1][:4]  # more than there are
    assert Learned(1, Kinds(("ffn",))).choose([[], [0.0], [1.0, 0.0]], 2).layers == ((), (1,), (1,))
    for bad in (0, -1, "x", [1, 2]):
        with pytest.raises(UserError, match="model.depth.read.learned.top: expected an integer"):
            SlotPolicy.from_plain({"learned": bad}, "model.depth.read")


def test_scores_of_slots() -> None:
    depth: dict[str, Any] = {"mechanism": "moda", "read": {"learned": 2}}
    with pytest.raises(UserError, match="attention_backend: expected auto, split or reference with .*learned, got fus"):
        ModelConfig(**SMALL, depth=depth, attention_backend="fused")
    net = build("post", depth)
    scores = {n: p for n, p in net.named_parameters() if n.endswith("scores")}
    assert list(scores) == [f"blocks.{i}.depth.scores" for i in (1, 2, 3)]
    net.init_weights(max_seq_len=16, device=torch.device("cpu"))
    assert all(p.shape == (6,) and not p.any() for p in scores.values())
    model = net.config.model
    assert ("trained scores of slots", "18") in model.depth.describe(model)
    assert fnmatch.filter(scores, model.depth.no_weight_decay[0]) == list(scores)


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


@pytest.mark.parametrize(
    "options", [dict(mode=Mode.full), dict(mode=Mode.selected_modules, modules=["blocks.*.attention"])]
)
@pytest.mark.parametrize("name", ["recent-3", "learned"])
def test_checkpointing_where_gradients_take_rows_of_keys(name: str, options: dict[str, Any]) -> None:
    read, expected = READS[name]
    net = build("post", {"mechanism": "moda", "read": read}, n_layers=5)
    net.apply_activation_checkpointing(**options)
    check(net, "post", {**DEPTH, "reads": lambda layer, kinds: expected[layer]}, n_layers=5)
