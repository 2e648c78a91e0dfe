"""Products in float8: against the same rounding in fp64, compiled, recomputed, and checkpoints that runs without it read."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from olmo_core.optim import AdamWConfig
from olmo_core.train.train_module.transformer import TransformerActivationCheckpointingConfig
from olmo_core.train.train_module.transformer import TransformerActivationCheckpointingMode as Mode
from torch import Tensor

from moda.checkpoints import match_weights
from moda.config import load_config
from moda.config.choices import Float8
from moda.config.model import ModelConfig
from moda.errors import UserError
from moda.model import transformer_config
from moda.model.linear import joint_linear
from moda.train import float8
from moda.train.float8 import apply_float8, check_float8
from moda.train.module import OneProcessTrainModule
from moda.train.plan import make_plan
from moda_kernels.moda_attention.quantised import fp8_missing
from moda_kernels.yardstick import report, verdicts
from tests.tiny import run, weights, write_config
from tests.train.test_module import LENGTH, VOCAB, _train

SIZES: dict[str, Any] = dict(d_model=32, n_heads=2, n_kv_heads=1, ffn_hidden_size=48, vocab_size=VOCAB)
CPU = torch.device("cpu")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra float8")
recipes = pytest.mark.parametrize("recipe", list(Float8), ids=lambda recipe: recipe.value)
gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or fp8_missing(torch.device("cuda")) is not None, reason="needs a GPU with float8"
)


def model_of(depth: str | None = None, **changes: Any) -> Any:
    section = {**SIZES, "n_layers": 3, "depth": depth and {"mechanism": depth}, **changes}
    return transformer_config(ModelConfig(**section))


CASES: list[tuple[list[str], int, str]] = [
    ([], 1, "null without torchao, got rowwise (pip install"),
    ([], 1, "null on this GPU, got rowwise (e4m3 needs compute capability 8.9"),
    (["parallel.tensor=2"], 2, "null with parallel.tensor, got rowwise"),
    (["parallel.activation_checkpointing=selected_ops"], 1, "tensorwise or null with parallel.activation"),
    (["train.sequence_length=20"], 1, "null where a process runs 40 tokens at a time, got rowwise (train.micro"),
    (["train.sequence_length=24", "parallel.context=2"], 2, "null where a process runs 24 tokens at a time"),
]  # fmt: skip


@pytest.mark.parametrize("overrides, processes, text", CASES, ids=[text.split(",")[0] for _, _, text in CASES])
def test_what_cannot_run_is_refused(
    overrides: list[str], processes: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if "torchao" in text else importlib.util.find_spec("torch")
    monkeypatch.setattr(float8, "find_spec", lambda name: found)
    if "GPU" in text:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 0))
    config = load_config(write_config(tmp_path), ["train.float8=rowwise", *overrides])
    with pytest.raises(UserError) as caught:
        if "GPU" in text:
            check_float8(config)
        else:
            make_plan(config, processes)
    assert str(caught.value).startswith(f"train.float8: expected {text}")
    check_float8(dataclasses.replace(config, train=dataclasses.replace(config.train, float8=None)))


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """What is left of ``x`` ``[M, N]``, in fp64: under one scale, or under one for all numbers along ``dim``, a power of two."""
    top = torch.finfo(dtype).max
    amax = x.double().abs().amax() if dim is None else x.double().abs().amax(dim, keepdim=True)
    scale = (top / amax).float()
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x.float() * scale).clamp(-top, top).to(dtype).double() / scale


def product(operands: dict[str, Tensor], recipe: Float8, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear ``[M, K] -> [M, N]`` and its gradients, of rounded operands, multiplied in ``dtype``."""
    x, w, g = operands["x"], operands["w"], operands["g"]
    rows = recipe == Float8.rowwise
    e4m3, grads = torch.float8_e4m3fn, torch.float8_e4m3fn if rows else torch.float8_e5m2

    def mm(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
        left = rounded(a, kind, 1 if rows else None)
        return left.to(dtype) @ rounded(b, e4m3, 0 if rows else None).to(dtype)

    return {
        "out": mm(x, w.t(), e4m3) + operands["b"].to(dtype), "x": mm(g, w, grads), "w": mm(g.t(), x, grads),
        "b": g.to(dtype).sum(0),
    }  # fmt: skip


@torchao
@recipes
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])])
def test_a_joint_product_is_that_of_rounded_operands(recipe: Float8, device: str) -> None:
    """Forward and both products of the backward pass, three linears at once."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    held = nn.ModuleList(nn.Linear(64, n, dtype=torch.bfloat16) for n in (64, 32, 32)).to(device)
    convert_to_float8_training(held, config=Float8LinearConfig.from_recipe_name(recipe.value))
    x, g = (torch.randn(48, n).bfloat16().to(device) for n in (64, 128))
    x.requires_grad_()
    out = torch.cat(joint_linear(x.view(3, 16, 64), *held), -1).view(48, 128)
    out.backward(g)
    w, b = (torch.cat([getattr(m, name).detach() for m in held]) for name in ("weight", "bias"))
    grads = {
        short: torch.cat([getattr(m, name).grad for m in held]) for short, name in (("w", "weight"), ("b", "bias"))
    }
    operands = {"x": x.detach(), "w": w, "b": b, "g": g}
    plain, truth = (product(operands, recipe, dtype) for dtype in (torch.bfloat16, torch.float64))
    judged = verdicts({"out": out, "x": x.grad, **grads}, plain, truth)
    assert all(v.passed for v in judged), report(judged)


@torchao
@pytest.mark.parametrize("depth, recipe", [(None, Float8.tensorwise), ("moda", Float8.rowwise)], ids=["plain", "moda"])
def test_compiled_blocks_share_graphs(depth: str | None, recipe: Float8) -> None:
    from torch._dynamo.utils import counters

    model = model_of(depth, n_layers=4).build()
    apply_float8(model, recipe)
    model.init_weights(max_seq_len=LENGTH, device=CPU)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        for block in model.blocks.values() if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        model._compile_enabled = compiled
        out = model(ids, labels=ids, return_logits=True)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert 0 < counters["stats"]["unique_graphs"] <= 2
    torch.testing.assert_close(results[1], results[0])


@torchao
@pytest.mark.parametrize("mode", [Mode.full, Mode.selected_modules])
def test_recomputed_blocks_give_the_same_bits(mode: Mode) -> None:
    runs = []
    for checkpointed in (False, True):
        model = model_of("moda").build(init_device="meta")
        apply_float8(model, Float8.rowwise)
        modules = ["blocks.*.feed_forward"] if mode == Mode.selected_modules else None
        module = OneProcessTrainModule(
            model, half=torch.bfloat16, device=CPU, rank_microbatch_size=2 * LENGTH, max_sequence_length=LENGTH,
            optim=AdamWConfig(lr=1e-2),
            ac_config=TransformerActivationCheckpointingConfig(mode=mode, modules=modules) if checkpointed else None,
        )  # fmt: skip
        figures, state = _train(module)
        runs.append((figures, state["logits"].tolist()))
    assert runs[0] == runs[1]


@torchao
def test_sizes_that_stay_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Queries of 32 columns are in float8, the keys and values of 8 beside them are not, nor what MUDD has between blocks."""
    model = model_of("mudd", n_heads=4, ffn_hidden_size=40).build()
    apply_float8(model, Float8.tensorwise)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name == float8.__name__]
    assert said == [
        "train.float8: not multiples of 16, and so without float8: blocks.*.attention.w_k (8 x 32), "
        "blocks.*.attention.w_v (8 x 32), blocks.*.feed_forward.w1 (40 x 32), "
        "blocks.*.feed_forward.w2 (32 x 40), blocks.*.feed_forward.w3 (40 x 32)"
    ]
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == {
        f"blocks.{i}.attention.{name}" for i in range(3) for name in ("w_q", "w_out")
    }
    model.init_weights(max_seq_len=LENGTH, device=CPU)
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    model(ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match="train.float8: expected null for a model without linears whose sizes are mult"):
        apply_float8(model_of(d_model=40, n_heads=5).build(), Float8.rowwise)


@torchao
def test_checkpoints_are_those_of_any_other_run(tmp_path: Path) -> None:
    """Begun in float8, gone on without, and the other way round; what is saved fits the plain model to the name."""
    config = write_config(tmp_path)
    parts = {"a": ("tensorwise", "null"), "b": ("null", "rowwise")}
    losses = {}
    for name, (first, second) in parts.items():
        folder = tmp_path / name
        for value, steps in ((first, 4), (second, 8)):
            said = run(config, f"train.float8={value}", f"train.max_steps={steps}", f"train.save_folder={folder}")
            assert said.returncode == 0, said.stdout + said.stderr
        assert f"setting changed since the checkpoint: train.float8: {first.replace('null', 'None')} -> " in said.stdout
        losses[name] = weights(folder / "step8")
    assert losses["a"].keys() == losses["b"].keys()
    assert any(not torch.equal(x, losses["b"][key]) for key, x in losses["a"].items())
    plan = make_plan(load_config(config), 1)
    plain = plan.transformer.build()
    found = match_weights(tmp_path / "b" / "step8", plain)
    plain.load_state_dict(found, strict=False)
    assert all(x.dtype == torch.float32 for x in found.values())
