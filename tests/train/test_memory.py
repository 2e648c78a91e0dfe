"""The memory estimate: activations against what is really saved, ``auto``, refusals, and out of memory as one message."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

from moda.config import load_config
from moda.config.choices import Float8
from moda.config.model import ModelConfig
from moda.config.schema import Checkpointing, RunConfig
from moda.errors import UserError
from moda.model import transformer_config
from moda.train import memory
from moda.train import run as run_module
from moda.train.float8 import apply_float8
from moda.train.memory import Device, a_gpu, estimate_memory, fitted, out_of_memory
from moda.train.plan import Plan, make_plan
from tests.tiny import ROOT, write_config

SMALL: dict[str, Any] = dict(d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_size=640, vocab_size=96)
TOKENS = 256


class Watched(nn.Module):
    """A block whose saved tensors are counted, each storage once, without parameters."""

    def __init__(self, block: nn.Module, known: set[int]) -> None:
        super().__init__()
        self.block, self.known = block, known
        self.saved: dict[int, int] = {}

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.known and x.dtype != torch.int64:
            self.saved[storage.data_ptr()] = storage.nbytes()
        return x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            return self.block(*args, **kwargs)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("depth", [None, {"mechanism": "moda"}], ids=["plain", "moda"])
@pytest.mark.parametrize("float8", [None, *Float8], ids=["bf16", "tensorwise", "rowwise"])
def test_activations_are_what_a_block_saves(depth: Any, compiled: bool, float8: Float8 | None) -> None:
    """By the partitioner that also serves inductor, in bf16; two sequences, so that tables of the rotation are small."""
    config = transformer_config(ModelConfig(**SMALL, depth=depth))
    model = config.build()
    if float8 is not None:
        pytest.importorskip("torchao")
        apply_float8(model, float8)
    model.init_weights(max_seq_len=TOKENS // 8, device=torch.device("cpu"))
    model = model.to(torch.bfloat16)
    block: Any = model.blocks["0"]
    if compiled:
        torch.compiler.reset()
        block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    model.blocks["0"] = watched = Watched(block, known)
    out = model(torch.randint(0, 96, (8, TOKENS // 8)), labels=torch.randint(0, 96, (8, TOKENS // 8)))
    assert torch.isfinite(out.loss)
    estimated = sum(memory._block(config, TOKENS, 2, compiled, float8 is not None).values())
    if depth is not None:
        # The second and last layer writes no slot, so that the first has all that is MoDA's.
        estimated += config.model.depth.block_memory(config.model, TOKENS, 2)  # type: ignore[union-attr]
    assert estimated == pytest.approx(sum(watched.saved.values()), rel=0.03 if compiled else 0.08)


#: GiB of forward and backward, bf16 parameters (``bench.py training``), H200 and H100, when the loss came from logits.
MEASURED = {
    ("olmo2_700m", 8): 71.12, ("moda_700m", 8): 72.93, ("olmo2_700m", 4): 36.3, ("moda_700m", 4): 37.3,
}  # fmt: skip


@pytest.mark.parametrize("name, batch", MEASURED, ids=str)
def test_activations_of_whole_models_are_the_measured_ones(name: str, batch: int) -> None:
    """Their peak was at the loss: parameters, activations, depth keys and values, logits in bf16 and once in fp32."""
    t = transformer_config(load_config(ROOT / "configs" / f"{name}.yaml").model)
    tokens = batch * 4096
    parts = [2.0 * t.num_params, 6.0 * tokens * t.vocab_size, 2.0 * tokens * t.d_model]
    parts += [n * t.n_layers for n in memory._block(t, tokens, 2, True).values()]
    parts += memory.slots_memory(t, tokens, 2, True)[0].values()
    if t.model.depth is not None:
        parts.append(t.model.depth.block_memory(t.model, tokens, 2))
    assert sum(parts) / 2**30 == pytest.approx(MEASURED[name, batch], rel=0.01)


def plan_of(name: str, *overrides: str, gpus: int = 1, gib: float = 80) -> Plan:
    return make_plan(load_config(ROOT / "configs" / name, ["data.tokenizer=dolma2", *overrides]), gpus, a_gpu(gib))


def gib(p: Plan) -> float:
    return sum(estimate_memory(p).values()) / 2**30


@pytest.mark.parametrize("name", ["moda_700m.yaml", "olmo2_700m.yaml", "moda_1.5b.yaml", "olmo2_1.5b.yaml"])
def test_the_shipped_configurations_fit_80_gb(name: str) -> None:
    for gpus in (1, 8):
        p = plan_of(name, gpus=gpus)
        assert gib(p) < 0.92 * 80 and p.config.train.microbatch >= 2
        bigger = dataclasses.replace(p.config.train, microbatch_size=2 * p.config.train.microbatch)
        more = dataclasses.replace(p, config=dataclasses.replace(p.config, train=bigger))
        assert gib(more) > 0.92 * 80
        assert p.config.parallel.activation_checkpointing == Checkpointing.none


def test_the_readmes_run_on_one_gpu_fits_it() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    line = next(x for x in text.splitlines() if x.endswith("# one 80 GB GPU"))
    words = line.partition("#")[0].split()
    assert gib(plan_of(Path(words[2]).name, *words[3:])) < 0.92 * 80


def test_proposals_and_days() -> None:
    big = plan_of("moda_1.5b.yaml", "train.microbatch_size=64", gpus=16)
    (_, proposed), *_ = big.proposal()
    assert "parallel.data=hsdp parallel.shard_degree=8" in proposed and "train.microbatch_size=4" in proposed
    assert "nothing fits the 16.0 GiB" in plan_of("moda_1.5b.yaml", gib=16).proposal()[0][1]
    assert "parallel.activation_checkpointing=full" in plan_of("moda_700m.yaml", gib=18).proposal()[0][1]
    hours, days = (float(value.split()[0].replace(",", "")) for _, value in big.duration(0.5, 1e15))
    total = big.steps * big.config.train.tokens_per_step * big.flops_per_token
    assert hours == pytest.approx(total / 0.5e15 / 3600, rel=1e-3) and days == pytest.approx(hours / 24 / 16, rel=1e-3)


def test_checkpointing_is_chosen_where_nothing_fits_without() -> None:
    p = plan_of("moda_700m.yaml", gib=18)
    assert p.config.parallel.activation_checkpointing == Checkpointing.full and gib(p) < 0.92 * 18
    kept = plan_of("moda_700m.yaml", "parallel.activation_checkpointing=none", gib=18)
    assert kept.config.parallel.activation_checkpointing == Checkpointing.none and gib(kept) > 0.92 * 18


def test_a_number_stays_and_the_plan_has_no_auto() -> None:
    stated = plan_of("moda_700m.yaml", "train.microbatch_size=32")
    assert stated.config.train.microbatch == 32
    for p in (stated, plan_of("moda_700m.yaml", gpus=16)):
        share = p.config.train.global_batch_size // p.world_size
        assert share % p.config.train.microbatch == 0
        assert "auto" not in (p.config.train.microbatch_size, p.config.parallel.activation_checkpointing)


def test_each_purpose_costs_what_it_should() -> None:
    one, two = (estimate_memory(plan_of("moda_700m.yaml", f"train.microbatch_size={n}")) for n in (2, 4))
    assert all(two[k] == pytest.approx(2 * one[k], rel=0.1) for k in one if k.startswith(("act", "depth", "defer")))
    assert one["optimizer (two moments)"] == 2 * one["parameters"] > 2 * 4 * 705e6
    eight = estimate_memory(plan_of("moda_700m.yaml", gpus=8))
    ddp = estimate_memory(plan_of("moda_700m.yaml", "parallel.data=ddp", gpus=8))
    assert eight["parameters"] == ddp["parameters"] / 8 and "buckets of gradients" in ddp
    recent = estimate_memory(plan_of("moda_700m.yaml", "model.depth.read={recent: 8}"))
    assert "gradients of depth keys and values" not in recent  # they take the rows of keys and values


def test_ranks_of_a_pipeline_hold_microbatches_and_wait_little() -> None:
    four = "train.microbatch_size=4"
    whole = estimate_memory(plan_of("moda_700m.yaml", four, gpus=8))
    staged = estimate_memory(plan_of("moda_700m.yaml", four, "parallel.pipeline=4", gpus=8))
    # The first of four stages has 10 of 36 layers, up to 4 microbatches in flight, and 2 ranks for its parameters.
    assert staged["activations: FFN"] == pytest.approx(whole["activations: FFN"] * 4 * 10 / 36)
    slots = staged["depth keys and values"] / whole["depth keys and values"]
    assert slots == pytest.approx(4 * 20 / 70)  # those that its layers write
    several = estimate_memory(plan_of("moda_700m.yaml", four, "parallel={pipeline: 4, stages_per_rank: 3}", gpus=8))
    assert several["depth keys and values"] > staged["depth keys and values"]  # what was received three times
    auto = ("train.microbatch_size=auto", "parallel={pipeline: 4, activation_checkpointing: full}")
    chosen = plan_of("moda_700m.yaml", *auto, gpus=8).config
    assert 9 * 3 <= chosen.train.global_batch_size // (2 * chosen.train.microbatch) < 2 * 9 * 3
    few = plan_of("moda_700m.yaml", *auto, "train.global_batch_size=16", gpus=8)
    assert few.config.train.microbatch == 1 and "8; stages wait for 27.3%" in dict(few.rows())["microbatches per step"]


def test_what_cannot_fit_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "this_machine", lambda: Device(2**10, False, "this host"))
    monkeypatch.setattr(run_module, "prepare_environment", lambda seed: pytest.fail("went on"))
    with pytest.raises(
        UserError, match=r"train.microbatch_size: expected a run that fits the 0.0 GiB of this host, got 2, which"
    ):
        run_module.train(load_config(write_config(tmp_path)))


def test_a_graph_leaves_memory_to_evaluations() -> None:
    """What it computes in is its own for the whole run."""
    needed = gib(plan_of("moda_700m.yaml", "train.microbatch_size=1"))
    for there, pays in ((needed / 0.76, False), (needed / 0.74, True)):
        assert plan_of("moda_700m.yaml", "train.microbatch_size=1", gib=there).graphs_pay == pays
    assert not plan_of("moda_700m.yaml", "train.microbatch_size=8", gib=800).graphs_pay, "long enough without"


def test_memory_of_the_host_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks the host")
    one = memory.this_machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert memory.this_machine().memory == one.memory / 8 and "8 processes" in memory.this_machine().name


def test_a_container_has_less_than_its_host(tmp_path: Path) -> None:
    for name, text in (("free", "max\n"), ("bounded", "1073741824\n")):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("free", "bounded", "none")]
    assert memory._container_limits(files) == [math.inf, 2**30]


@pytest.mark.parametrize("kind", ["gpu", "wrapped", "host", "driver"])
def test_out_of_memory_is_one_message(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import moda_cli

    def fail(*_: Any) -> None:
        error: Exception = torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 12.25 GiB. GPU 0 has ...\nmore"
        )
        if kind == "host":
            error = RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: ...")
        if kind == "driver":
            error = RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` ...")
        if kind == "wrapped":
            raise RuntimeError("while compiling") from error
        raise error

    monkeypatch.setattr(run_module, "build_train_module", fail)
    monkeypatch.setenv("RANK", "3")  # it is that rank's to say
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(run_module, "prepare_environment", lambda seed: None)
    monkeypatch.setattr(run_module, "teardown_training_environment", lambda: None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    code = moda_cli.main(
        ["train", str(write_config(tmp_path, train={"global_batch_size": 8})), "train.microbatch_size=2"]
    )
    err = capsys.readouterr().err
    assert (
        code == 2
        and err.count("\n") == 1
        and err.startswith("error: train.microbatch_size: expected a run that fits the ")
    )
    assert "out of memory on rank 3" in err and "the estimate was" in err and "activation_checkpointing=full" in err
    assert ("12.25 GiB more were asked for" in err) == (kind in ("gpu", "wrapped"))


def test_other_errors_are_not_about_memory() -> None:
    assert out_of_memory(plan_of("moda_700m.yaml"), RuntimeError("nan loss encountered at step 3")) is None


def test_the_least_of_all_ranks_is_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_config(ROOT / "configs" / "moda_700m.yaml")
    small, large = (make_plan(asked, 2, a_gpu(n)) for n in (24, 80))
    configs: list[tuple[float, RunConfig]] = [(p.device.room, p.config) for p in (large, small)]
    monkeypatch.setattr(run_module, "is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, mine: out.__setitem__(slice(None), configs))
    assert run_module._agreed(large, asked).config == small.config != large.config
    stated = fitted(dataclasses.replace(large.config), large.transformer, 2, large.device)
    assert stated == large.config  # nothing left to choose
