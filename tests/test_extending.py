"""The recipes of docs/extending.md, run as they stand: their code, a line in a registry, and all that must then know it."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moda.config import load_config
from moda.depth import DepthMechanism
from moda.depth.read import SlotPolicy
from moda.errors import UserError
from moda.hf import section_of, to_hf
from moda.hf.configuration_moda import MoDAConfig
from moda.hf.modeling_moda import MoDAForCausalLM
from moda.model import transformer_config
from moda.placements import NormPlacement
from moda.train.plan import make_plan
from moda.typed import to_dict
from tests.model.test_against_plain import DEPTH, build, check
from tests.plain_model import PLACEMENTS, rms
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE = {Path(m[1]).stem: m[0] for m in re.findall(r"```python\n((?:# (\S+))\n.*?)```", PAGE, flags=re.DOTALL)}
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(5))


def load(name: str) -> types.ModuleType:
    """The module that a recipe's code makes."""
    module = types.ModuleType(f"recipe_{name}")
    sys.modules[module.__name__] = module
    exec(compile(CODE[name], f"{name}.py", "exec"), vars(module))
    return module


@pytest.fixture
def registries() -> Iterator[None]:
    """Puts the registries back as they were."""
    families: tuple[Any, ...] = (NormPlacement, SlotPolicy, DepthMechanism)
    before = [dict(f.known) for f in families]
    yield
    for family, known in zip(families, before):
        family.known = known


def known_everywhere(overrides: list[str], shown: str) -> None:
    """Configuration, planner, training, evaluation's masks, export and decoding with a cache."""
    shape = ["model.n_layers=3", "model.d_model=32", "model.ffn_hidden_size=48", "model.vocab_size=61"]
    config = load_config(ROOT / "configs" / "moda_demo.yaml", [*shape, *overrides])
    assert shown in str(to_dict(config.model))
    planned = load_config(ROOT / "configs" / "moda_demo.yaml", [*shape[:3], *overrides])
    assert any(name == "parameters" for name, _ in make_plan(planned, 1).rows())
    form = transformer_config(config.model)
    net = form.build()
    net.init_weights(max_seq_len=16, device=torch.device("cpu"))
    assert sum(p.numel() for p in net.parameters()) == form.num_params
    assert net.num_flops_per_token(16) == form.num_flops_per_token(16)
    net(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, -1, -1)
    with torch.no_grad():
        truth = net(IDS)
        assert net.shares_prefix
        torch.testing.assert_close(net(IDS, mask=causal), truth, rtol=1e-4, atol=1e-5)
        exported = MoDAForCausalLM(MoDAConfig(model=to_dict(section_of(form)))).eval()
        exported.load_state_dict(to_hf(dict(net.named_parameters(remove_duplicate=False)), 61))
        torch.testing.assert_close(exported(IDS).logits, truth, rtol=1e-4, atol=1e-5)
        greedy = exported.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        for n in range(7, 11):
            assert greedy[0, n] == net(greedy[:, :n])[0, -1].argmax()


def test_every_recipe_of_the_table_is_on_the_page() -> None:
    rows = re.findall(r"^\| an? ([\w ]+) \|", PAGE, flags=re.MULTILINE)
    headings = re.findall(r"^## An? (.+)$", PAGE, flags=re.MULTILINE)
    assert rows == headings and len(CODE) == len(rows)


def test_a_norm_placement(registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = load("deep").Deep
    NormPlacement.register(*NormPlacement.known.values(), deep)
    formula = re.search(r'`"deep": (lambda [^`]*)`', PAGE)
    assert formula is not None
    monkeypatch.setitem(PLACEMENTS, "deep", eval(formula[1], {"rms": rms}))
    for options in (None, DEPTH):
        check(build("deep", options), "deep", options)
    x, out = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    made = deep(3.0).combine(x, out, [torch.tanh], torch.add)
    assert torch.equal(made, torch.tanh(3.0 * x + out))
    for depth in ("null", "{mechanism: moda}", "{mechanism: denseformer}"):
        if depth != "null":
            known_everywhere(["model.norm_placement={deep: 3.0}", f"model.depth={depth}"], "{'deep': 3.0}")
    plain = load_config(ROOT / "configs" / "olmo2_demo.yaml", ["model.norm_placement=deep", "model.vocab_size=61"])
    net = transformer_config(plain.model).build()
    net.init_weights(max_seq_len=16, device=torch.device("cpu"))
    net(IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match=r"did you mean 'deep'\?"):
        load_config(ROOT / "configs" / "olmo2_demo.yaml", ["model.norm_placement=depe"])


def test_a_slot_policy(registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load("powers").Powers
    SlotPolicy.register(*SlotPolicy.known.values(), policy)
    assert policy(2).slots(5, 2) == (2, 6, 8, 9) and policy(2).slots(1, 2) == (0, 1) and policy(1).slots(2, 2) == (3,)
    for attention in ("reuse", "project"):
        net = build("post", {"mechanism": "moda", "attention": attention, "read": {"powers": 2}}, n_layers=5)
        check(net, "post", {**DEPTH, "attention": attention, "reads": policy(2).slots}, n_layers=5)
    known_everywhere(["model.depth.read={powers: 2}"], "{'powers': 2}")
    with pytest.raises(UserError, match="model.depth.read.powers.n: expected an integer >= 1, got 0"):
        load_config(ROOT / "configs" / "moda_demo.yaml", ["model.depth.read={powers: 0}"])
    monkeypatch.setattr(policy, "slots", lambda self, layer, kinds: (2,))  # that no layer before the second one writes
    with pytest.raises(UserError, match="model.depth.read: .*for layer 0 from the policy powers, got"):
        load_config(ROOT / "configs" / "moda_demo.yaml", ["model.depth.read={powers: 2}"])


def test_the_page_names_every_slot_policy() -> None:
    rows = re.findall(
        r"^\| `(\{?\w+.*?)` \|", PAGE[PAGE.index("## A slot policy") : PAGE.index("moda draw docs")], re.MULTILINE
    )
    assert [SlotPolicy.from_plain(yaml.safe_load(row), "read").name for row in rows[1:]] == list(SlotPolicy.known)


def test_a_mechanism(registries: None) -> None:
    mechanism = load("layer_scale").LayerScale
    DepthMechanism.register(*DepthMechanism.known.values(), mechanism)
    known_everywhere(["model.depth={mechanism: layer_scale, start: 0.2}"], "layer_scale")
    config = load_config(ROOT / "configs" / "moda_demo.yaml", ["model.depth.mechanism=layer_scale"])
    assert config.model.depth is not None
    assert config.model.depth.num_params(config.model) == 4 * 2 * 128
    net = transformer_config(config.model, 61).build()
    net.init_weights(max_seq_len=16, device=torch.device("cpu"))
    assert torch.equal(net.blocks["0"].depth.attention_scale, torch.full((128,), 0.1))


def test_a_sequence_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from moda_kernels.moda_attention.naive import naive_attention
    from moda_kernels.moda_attention.problem import make_problem
    from moda_kernels.moda_attention.split import sequence
    from moda_kernels.moda_attention.tensors import Inputs

    kernel = load("dense").Dense()
    monkeypatch.setitem(sequence._KERNELS, kernel.name, kernel)
    sequence._present.cache_clear()
    q, k, v = (torch.randn(2, 5, h, 16).requires_grad_() for h in (4, 2, 2))
    p = make_problem(Inputs(q, k, v))
    assert sequence.choose(p.kind._replace(sequence_kernel="dense")) is kernel
    sequence._present.cache_clear()
    out, lse = naive_attention(q, k, v)
    do = torch.randn_like(out)
    found = kernel.forward(p, q.detach(), k.detach(), v.detach())
    for ours, truth in zip(found, (out, lse)):
        torch.testing.assert_close(ours, truth)
    grads = kernel.backward(p, do, q.detach(), k.detach(), v.detach(), *found)
    for ours, truth in zip(grads, torch.autograd.grad(out, (q, k, v), do)):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_an_evaluation_task(monkeypatch: pytest.MonkeyPatch) -> None:
    from moda_evals import tasks

    task = load("capitals").CAPITALS
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    assert tasks.resolve_tasks(["capitals"]) == [task]
    with pytest.raises(UserError, match=r"did you mean 'capitals'\?"):
        tasks.resolve_tasks(["capitols"])


def test_a_data_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moda.data import build_training_data, load_tokenizer, sources

    source = load("random").Random()
    monkeypatch.setitem(sources.SOURCES, source.name, source)
    changes = [f"data.work_dir={tmp_path}", "data.text=null", "data.source={random: {tokens: 5000}}"]
    config = load_config(ROOT / "configs" / "moda_demo.yaml", changes)
    tokenizer = load_tokenizer(config.data.tokenizer)  # type: ignore[arg-type]
    built = build_training_data(config.data, tokenizer, 256)
    assert built.tokens == 5000 and len(built.train.build()) == 5000 // 256
    for wrong, words in (("{randon: {tokens: 1}}", r"did you mean 'random'\?"), ("{random: {tokns: 1}}", "tokens")):
        with pytest.raises(UserError, match=words):
            bad = load_config(ROOT / "configs" / "moda_demo.yaml", [*changes[:2], f"data.source={wrong}"])
            build_training_data(bad.data, tokenizer, 256)
    with pytest.raises(UserError, match="exactly one of"):
        build_training_data(load_config(ROOT / "configs" / "moda_demo.yaml", changes[2:]).data, tokenizer, 256)
