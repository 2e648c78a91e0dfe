"""Whole steps and their scaling: FLOPs by an independent count, kernels by kind, rows from tiny runs, one under torchrun."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moda.bench import point as points
from moda.bench import scaling, step
from moda.bench.breakdown import KINDS, Kernel, breakdown, kind_of, unknown
from moda.bench.point import OLMO_CORE, Point, main, measure
from moda.config.model import ModelConfig
from moda.model import transformer_config
from moda_kernels.benchmarks import results
from tests.tiny import PROCESSES, write_config

SMALL: dict[str, Any] = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, ffn_hidden_size=256, vocab_size=512)


def counted(model: Any, length: int) -> float:
    """FLOPs per token of forward and backward as PyTorch counts the operators that run: attention with its whole square."""
    ids = torch.randint(0, 512, (1, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops() / length


@pytest.mark.parametrize("depth", [None, {"mechanism": "moda"}], ids=["plain", "moda"])
def test_flops_of_mfu(depth: Any) -> None:
    """What grows with the length is the attention, of which the causal half counts. The counter cannot look into MoDA's operator:
    there the two products of its queries with what they see, three times for forward and backward, are added by hand."""
    config = transformer_config(ModelConfig(**SMALL, depth=depth))
    model = config.build()
    model.init_weights(max_seq_len=256, device=torch.device("cpu"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # whose matrix products are seen
        short, long = counted(model, 64), counted(model, 256)
    layers, one_key = SMALL["n_layers"], 3 * 2 * 2 * SMALL["d_model"]
    slope = (long - short) / (256 - 64)
    assert slope == pytest.approx(one_key * layers if depth is None else 0.0, rel=1e-6)
    slots = 0 if depth is None else sum(2 * layer for layer in range(layers))
    expected = short - 64 * slope + one_key * (layers * 257 / 2 + slots)
    assert config.num_flops_per_token(256) == pytest.approx(expected, rel=0.01)


NAMES = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNN": "matmul", "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": "matmul",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at__0": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void con": "attention",
    "forward_kernel": "attention", "_depth_forward_kernel": "depth_forward", "_depth_backward_kernel": "depth_backward",
    "_flush_kernel": "depth_flush", "_flush_few_kernel": "depth_flush", "_row": "loss",
    "triton_red_fused__log_softmax__to_copy_nll_loss_forward_3": "loss",
    "triton_poi_fused__scaled_dot_product_cudnn_attention_clone_2": "norms_copies",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "norms_copies",
    "Memcpy DtoD (Device -> Device)": "norms_copies",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, Copy<float>>": "norms_copies",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, LpNormFunctor>": "optimizer",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "strange": "other",
}  # fmt: skip


@pytest.mark.parametrize("name, kind", NAMES.items())
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind and kind in KINDS


def test_a_breakdown_counts_each_moment_once() -> None:
    kernels = [
        Kernel("nvjet", 0, 1000), Kernel("nvjet", 4000, 5000), Kernel("_depth_forward_kernel", 500, 2000),
        Kernel("ncclDevKernel_AllGather", 1500, 3000), Kernel("strange", 5000, 5100),
    ]  # fmt: skip
    parts = breakdown(kernels, steps=2, step_ms=3.0)
    expected = {"matmul": 1.0, "depth_forward": 0.5, "communication": 0.5, "other": 0.05, "gaps": 3.0 - 2.05}
    expected["communication_all"] = 0.75
    assert {k: v for k, v in parts.items() if v} == pytest.approx(expected)
    assert sum(parts[kind] for kind in (*KINDS, "gaps")) == pytest.approx(3.0) and unknown(kernels) == ["strange"]


def test_ranks_that_share_sequences_have_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = str(write_config(tmp_path, train=dict(microbatch_size=2)))
    for key, batch in {"tensor": 6, "context": 6, "pipeline": 6, "prefetch": 12}.items():
        point = Point(config, [f"parallel.{key}=2"], microbatches=3)
        assert points._settings(point, tmp_path).config.train.global_batch_size == batch


def run(point: Point, folder: Path) -> dict[str, Any]:
    """A point on one process, which has imported everything already."""
    folder.mkdir()
    (folder / "point.json").write_text(json.dumps(dataclasses.asdict(point)))
    process = PROCESSES.Process(target=main, args=(str(folder / "point.json"),))
    process.start()
    process.join(200)
    return json.loads((folder / "result.json").read_text())


def test_rows_of_one_process(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, model=dict(depth=None, n_layers=2), train=dict(microbatch_size="auto")))
    ours = run(Point(config, steps=2), tmp_path / "ours")
    theirs = run(Point(config, variant=OLMO_CORE, steps=2, batch=8), tmp_path / "theirs")
    for row in (ours, theirs):
        assert row["status"] == "ok" and 0 < row["p20_ms"] <= row["step_ms"] <= row["p80_ms"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 32e3 / row["step_ms"], rel=0.01)
        assert row["first_step_s"] > 0 and row["gaps_ms"] == row["mfu_percent"] == ""
    assert (ours["microbatch"], ours["batch"], ours["sharding"]) == (4, 8, "none")
    assert theirs["sharding"] == "fsdp" and theirs["params"] == ours["params"] and theirs.keys() == ours.keys()
    refused = run(Point(config, ["train.microbatch_size=4"], batch=6), tmp_path / "refused")
    assert refused["status"].startswith("refused: train.microbatch_size: expected a divisor of")
    assert refused.keys() == ours.keys()


def test_scaling_of_two_processes(tmp_path: Path) -> None:
    config = write_config(tmp_path, model=dict(n_layers=2))
    base = Point(str(config), steps=2, microbatches=1)
    *_, rows = scaling.scaling_table(base, [2], [1], ["weak", "strong"])
    assert [row["series"] for row in rows] == ["weak", "strong"]
    for row in rows:
        assert row["status"] == "ok", row["status"]
        assert (row["sharding"], row["batch"], row["over_first"]) == ("fsdp", 4, 1.0)
        assert row["tokens_per_second"] == pytest.approx(2 * row["tokens_per_second_per_gpu"], abs=2)
    where = {"gpu": "", "commit": "c"}
    path = results.merge(tmp_path / "table.csv", rows, scaling.KEY, where)
    with path.open(newline="") as f:
        assert [row["commit"] for row in csv.DictReader(f)] == ["c", "c"]
    assert scaling.draw(path).stat().st_size > 10_000


def test_a_point_that_hangs_is_ended(tmp_path: Path) -> None:
    row = measure(Point(str(write_config(tmp_path))), timeout=0.2)
    assert row["status"] == "failed: no end after 0 s" and row["tokens_per_second"] == ""


def test_points_of_a_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Point("c.yaml", ["optim.lr=1", "train.microbatch_size=auto"], microbatches=2)
    made = [
        (names, p.gpus, p.replicas, p.microbatches)
        for names, p in scaling.series_points(base, [1, 2, 4, 8], [1, 2, 4], ["weak", "strong"])
    ]
    assert made == [
        (["weak"], 1, 1, 2), (["strong"], 1, 1, 16), (["weak"], 2, 1, 2), (["strong"], 2, 1, 8),
        (["weak"], 4, 1, 2), (["strong"], 4, 1, 4), (["weak", "strong"], 8, 1, 2),
        (["weak"], 4, 2, 2), (["strong"], 4, 2, 4), (["weak", "strong"], 8, 2, 2), (["weak", "strong"], 8, 4, 2),
    ]  # fmt: skip
    asked = []

    def pretend(point: Point, timeout: float) -> dict[str, Any]:
        asked.append(point)
        if point.gpus == 2:
            return point.row("out of memory")
        return point.row(
            "ok", microbatch=8, checkpointing="full", step_ms=1.0, p20_ms=1.0, p80_ms=1.0, first_step_s=1.0,
            tokens_per_second=100 * point.gpus - point.gpus**2, tokens_per_second_per_gpu=100 - point.gpus,
        )  # fmt: skip

    monkeypatch.setattr(points, "measure", pretend)
    *_, rows = scaling.scaling_table(base, [1, 2, 4], [1], ["weak"])
    assert [row["status"] for row in rows] == ["ok", "out of memory", "ok"]
    assert [row["over_first"] for row in rows] == [1.0, "", round(96 / 99, 4)]
    assert asked[0].overrides == base.overrides and {row["overrides"] for row in rows} == {" ".join(base.overrides)}
    chosen = ["train.microbatch_size=8", "parallel.activation_checkpointing=full"]
    assert asked[2].overrides == ["optim.lr=1", *chosen]

    rows = step.step_table([Point("a.yaml", variant=OLMO_CORE), Point("a.yaml", gpus=2), Point("b.yaml")], rounds=2)
    assert [row["over_olmo_core"] for row in rows] == [1.0, "", 1.0]


def test_a_table_in_parts(tmp_path: Path) -> None:
    path, key = tmp_path / "t.csv", ("a",)
    results.merge(path, [{"a": 1, "b": 1}, {"a": 2, "b": 1}], key, {"commit": "old"})
    results.merge(path, [{"a": 2, "b": 2}, {"a": 3, "b": 2}], key, {"commit": "new"})
    assert path.read_text().splitlines() == ["a,b,commit", "1,1,old", "2,2,new", "3,2,new"]
    results.merge(path, [{"a": 1, "c": 1}], key, {"commit": "other"})
    assert path.read_text().splitlines() == ["a,c,commit", "1,1,other"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant, depth", [("moda", {"mechanism": "moda"}), (OLMO_CORE, None)])
def test_a_profile(tmp_path: Path, variant: str, depth: Any) -> None:
    """Nearly all of a step's kernels have a known kind, and kinds and gaps come to the step."""
    sizes = dict(d_model=512, n_layers=4, n_heads=8, n_kv_heads=4, ffn_hidden_size=2048, depth=depth)
    config = write_config(tmp_path, model=sizes, train=dict(sequence_length=512))
    row = run(Point(str(config), variant=variant, steps=4, profile=True), tmp_path / "point")
    assert row["status"] == "ok" and row["peak_gib"] > 0 and 0 < row["mfu_percent"] < 100
    parts = {kind: row[f"{kind}_ms"] for kind in (*KINDS, "gaps")}
    assert parts["matmul"] > 0 and parts["attention"] > 0 and parts["optimizer"] > 0 and parts["loss"] > 0
    assert (parts["depth_backward"] > 0) == (depth is not None)
    assert parts["other"] < 0.02 * row["step_ms"] and sum(parts.values()) >= row["step_ms"] - 0.1
