"""Every mistake gets one error that names the key, what is allowed and what was given."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moda.config import load_config
from moda.config.names import folder_name, own_folder
from moda.data import build_training_data, load_tokenizer
from moda.errors import UserError
from moda.train.memory import a_gpu
from moda.train.plan import make_plan
from tests.tiny import ROOT, make_text, make_tokenizer, run, write_config

CASES: list[tuple] = [
    ("modle.d_model=64", ["modle", "did you mean 'model'?"]),
    ("model.n_layer=3", ["model.n_layer", "did you mean 'n_layers'?"]),
    ("model.depth.key_nrom=writer", ["model.depth.key_nrom", "did you mean 'key_norm'?"]),
    ("model.d_model=wide", ["model.d_model", "an integer", "wide"]),
    ("model.n_layers=2.5", ["model.n_layers", "an integer", "2.5"]),
    ("model.n_layers=0", ["model.n_layers", "from 1 to 1000", "0"]),
    ("model.tie_embeddings=maybe", ["model.tie_embeddings", "true or false", "maybe"]),
    ("model.norm_placement=sandwich", ["model.norm_placement", "pre, post, reordered, peri", "sandwich"]),
    ("model.depth.attention=null", ["model.depth.attention", "reuse, project"]),
    ("model.depth.read={recent: 0}", ["model.depth.read.recent", ">= 1"]),
    ("model.depth.read={recent: some}", ["model.depth.read.recent", "an integer", "some"]),
    ("model.depth.read=recnet", ["model.depth.read", "all, recent", "did you mean 'recent'?"]),
    ("model.depth.read={all: 3}", ["model.depth.read", "all without a value", "3"]),
    ("model.depth.read={first_recent: {first: 2, recent: -1}}", ["model.depth.read.first_recent.recent", ">= 1", "-1"]),
    ("model.depth.read={first_recent: 3}", ["model.depth.read.first_recent.recent", "an integer", "it has no default"]),
    ("model.depth.read={stride: 0}", ["model.depth.read.stride", ">= 1", "0"]),
    ("model.depth.read={blocks: 1.5}", ["model.depth.read.blocks", "an integer", "1.5"]),
    ("model.depth.read={kinds: []}", ["model.depth.read.kinds", "[attention], [ffn] or [attention, ffn]", "[]"]),
    ("model.depth.read={kinds: [ffn, ffn]}", ["model.depth.read.kinds", "[attention, ffn], got ['ffn', 'ffn']"]),
    ("model.depth.read={kinds: [ffn, attention]}", ["model.depth.read.kinds", "[attention, ffn], got ['ffn', 'attention']"]),
    ("model.depth.read={kinds: [mlp]}", ["model.depth.read.kinds", "one of attention, ffn", "mlp"]),
    ("model.depth.read={kinds: ffn}", ["model.depth.read.kinds", "a list, each one of attention, ffn", "got ffn"]),
    ("model.depth.read={union: [{recent: 2}, {recent: 2}]}", ["model.depth.read.union", "two or more different slot policies"]),
    ("model.depth.read={intersect: [all, recnet]}", ["model.depth.read.intersect", "did you mean 'recent'?"]),
    ("model.depth.read={listed: [[], [0]]}", ["model.depth.read.listed", "a list for each of the", "got 2"]),
    ("model.depth.read={listed: [[], [1, 0], []]}", ["model.depth.read", "increasing slots 0 <= s < 2 for layer 1", "(1, 0)"]),
    ("model.depth.read={listed: [[], [0, 0], []]}", ["model.depth.read", "increasing slots", "(0, 0)"]),
    ("model.depth.read={listed: [[], [2], []]}", ["model.depth.read", "0 <= s < 2 for layer 1", "(2,)"]),
    ("model.depth.read={recent: 2, stride: 3}", ["model.depth.read", "the name of one slot policy"]),
    ("model.depth.read=recent", ["model.depth.read.recent.n", "an integer", "it has no default"]),
    ("model.depth.slots=3", ["model.depth.slots", "it is now read: {recent: N}"]),
    ("model.depth_kv={ffn: true}", ["model.depth_kv", "it is now model.depth: {mechanism: moda, ...}"]),
    ("model.depth.mechanism=mdoa", ["model.depth.mechanism", "moda, value_residual, denseformer", "did you mean 'moda'?"]),
    ("model.depth.dilation=2", ["model.depth.dilation", "an option of moda", "it is an option of denseformer; moda has att"]),
    ("model.depth=densformer", ["model.depth", "a section that names a mechanism", "{mechanism: denseformer}"]),
    ("model.depth={mechanism: denseformer, ffn: true}", ["model.depth.ffn", "an option of denseformer", "of moda"]),
    ("model.depth={mechanism: denseformer, dilation: 0}", ["model.depth.dilation", ">= 1"]),
    ("model.depth={ffn: true, mechanism: null}", ["model.depth.mechanism", "moda, value_residual, denseformer"]),
    ("model.depth=moda", ["model.depth", "a section that names a mechanism", "{mechanism: moda}"]),
    ("model.n_heads=5", ["model.n_heads", "a divisor of model.d_model (32)", "5"]),
    ("model.n_kv_heads=3", ["model.n_kv_heads", "a divisor of model.n_heads (4)", "3"]),
    ("model.head_dim=7", ["model.head_dim", "an even number", "7"]),
    ("model.qk_norm=none", ["model.depth.key_norm", "none where model.qk_norm is none", "writer"]),
    ("model.attention_backend=flash", ["model.attention_backend", "auto, reference, fused, split", "flash"]),
    ("model.vocab_size=100", ["model.vocab_size", "at least the tokenizer's 320", "100"]),
    ("optim.lr=-1", ["optim.lr", "> 0", "-1"]),
    ("optim.betas=[0.9]", ["optim.betas", "a list of 2 values"]),
    ("optim.betas=[0.9,1.0]", ["optim.betas", "from 0 to below 1"]),
    ("optim.warmup_steps=12", ["optim.warmup_steps", "less than the run's 12 steps", "12"]),
    ("train.microbatch_size=3", ["train.microbatch_size", "a divisor of train.global_batch_size (4)", "3"]),
    ("train.max_tokens=1000", ["train.max_tokens", "exactly one of train.max_tokens and train.max_steps", "both"]),
    ("train.save_folder=a/../..", ["train.save_folder", "a folder of its own", "a/../.."]),
    ("data.work_dir=.", ["data.work_dir", "a folder of its own"]),
    ("name=..", ["name", "a name for a folder", "'..'"]),
    ("train.load_other_reads=true", ["train.load_path", "a checkpoint where train.load_other_reads is true", "null"]),
    ("model.depth.read={dynamic: {of: all}}", ["model.depth.read.dynamic.top", "an integer", "it has no default"]),
    ("model.depth.read={learned: 0}", ["model.depth.read.learned.top", ">= 1", "0"]),
    ("model.depth.slot_dtype=fp16", ["model.depth.slot_dtype", "fp8", "fp16"]),
    ("train.seed=-1", ["train.seed", "from 0 to 4294967295", "-1"]),
    ("parallel.data=zero3", ["parallel.data", "fsdp, hsdp, ddp", "zero3"]),
    ("parallel.data=hsdp", ["parallel.data", "fsdp or ddp with one process"]),
    ("parallel={tensor: 2, data: ddp}", ["parallel.data", "fsdp or hsdp with parallel.tensor", "ddp"]),
    ("parallel={context: 2, data: hsdp}", ["parallel.data", "fsdp with parallel.context", "hsdp"]),
    ("parallel={context: 2, tensor: 2}", ["parallel.context", "1 with parallel.tensor", "2"]),
    ("parallel={pipeline: 2, data: ddp}", ["parallel.data", "fsdp or hsdp with parallel.pipeline", "ddp"]),
    ("parallel={pipeline: 2, tensor: 2}", ["parallel.tensor", "1 with parallel.pipeline", "2"]),
    ("parallel={pipeline: 2, context: 2}", ["parallel.context", "1 with parallel.pipeline", "2"]),
    ("parallel.pipeline=4", ["parallel.pipeline", "at most model.n_layers (3) stages", "4"]),
    ("parallel={pipeline: 2, stages_per_rank: 2}", ["parallel.pipeline", "at most model.n_layers (3) stages", "4"]),
    ("parallel.stages_per_rank=2", ["parallel.stages_per_rank", "1 without parallel.pipeline", "2"]),
    ("parallel.pipeline=2", ["parallel.pipeline", "a divisor of the 1 processes", "2"]),
    ("parallel.context=3", ["train.sequence_length", "a multiple of 2 x parallel.context (6)", "32"]),
    ("parallel.context=2", ["parallel.context", "a divisor of the 1 processes", "2"]),
    ("parallel.tensor=4", ["parallel.tensor", "a divisor of model.n_kv_heads (2)", "4"]),
    ("parallel.activation_checkpointing=selected_blocks", ["parallel.block_interval", "a value"]),
    ("parallel={prefetch: 1, activation_checkpointing: full}", ["parallel.prefetch", "0 with", "full", "FSDP"]),
    ("checkpoint.ephemeral_interval=9", ["checkpoint.ephemeral_interval", "less than checkpoint.interval (4)", "9"]),
    ("data.mix=OLMoE-mix-0824", ["data", "one of data.mix, data.paths, data.mixture, data.text and data.source", "mix, text"]),
    ("data.validation_fraction=1.5", ["data.validation_fraction", "between 0 and 1", "1.5"]),
    ("data.tokenizer=nowhere/tokenizer.json", ["data.tokenizer", "an existing tokenizer.json", "nowhere"]),
    ("data.tokenizer=some/name", ["data.tokenizer", "dolma2", "vocab_size and eos_token_id", "some/name"]),
    ("=3", ["override", "key=value", "=3"]),
    ("lonely", ["override", "key=value", "lonely"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def message(folder: Path, *overrides: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(load_config(write_config(folder), overrides), world_size)
    return str(caught.value)


@pytest.mark.parametrize("override, words", CASES, ids=[c[0] for c in CASES])
def test_one_error_names_key_allowed_and_given(folder: Path, override: str, words: list[str]) -> None:
    text = message(folder, override)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("depth", ["{mechanism: value_residual}", "{mechanism: mudd}"])
def test_parallelism_that_a_model_does_not_work_with(folder: Path, depth: str) -> None:
    text = message(folder, f"model.depth={depth}", "parallel.context=2", world_size=2)
    assert text.startswith("parallel.context: expected 1 with this model.depth"), text
    text = message(folder, f"model.depth={depth}", "parallel.pipeline=2", world_size=2)
    assert text.startswith("parallel.pipeline: expected 1 with this model.depth (its state would have to"), text
    if "mudd" in depth:
        text = message(folder, f"model.depth={depth}", "parallel.tensor=2", world_size=2)
        assert text.startswith("parallel.tensor: expected 1 with this model.depth (it is not split by heads yet)"), text


def test_what_does_not_work_with_a_pipeline(folder: Path) -> None:
    text = message(folder, "model.depth.slot_dtype=fp8", "parallel.pipeline=2", world_size=2)
    assert text.startswith(
        "parallel.pipeline: expected 1 with this model.depth (each stage would round slots in fp8"
    ), text
    text = message(folder, "logging.layers_interval=1", "parallel.pipeline=2", world_size=2)
    assert text.startswith("logging.layers_interval: expected null with parallel.pipeline"), text
    for stages, processes in (("parallel.pipeline=2", 4), ("parallel={pipeline: 2, stages_per_rank: 2}", 8)):
        text = message(folder, "model.n_layers=4", "train.global_batch_size=6", stages, world_size=8)
        assert text.startswith("train.global_batch_size: expected a multiple of"), text
        assert f"(2 x {processes})" in text


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".run", "a/b", "a\\b", "~", "a\0", "a\n", "\ud800", " a", "x" * 201]
)
def test_names_that_are_no_folders(name: str) -> None:
    with pytest.raises(UserError, match="^name: expected a name for a folder"):
        folder_name("name", name)


@pytest.mark.parametrize(
    "folder", [" ", "", ".", "..", "a/..", "a/../..", "/", "~", "~/run", "$HOME", "a\0", "file:///a", "http://a/b"]
)
def test_folders_that_no_run_may_have_for_its_own(folder: str) -> None:
    with pytest.raises(UserError, match="^train.save_folder: expected a folder"):
        own_folder("train.save_folder", os.path.expandvars(folder), remote=True)


def test_good_names_and_folders() -> None:
    for name in ("moda_1.5b", "caf\u00e9 2", "x" * 200):
        folder_name("name", name)
    for folder in ("runs/a", "../a", "/nowhere/a", "s3://bucket/a", "a b #2"):
        own_folder("train.save_folder", folder, remote=True)
    with pytest.raises(UserError, match="^data.work_dir: expected a folder, got s3://bucket/a"):
        own_folder("data.work_dir", "s3://bucket/a")


def test_wandb_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    text = message(folder, "logging.wandb.enabled=true")
    assert "logging.wandb.enabled" in text and "pip install" in text


def test_wandb_needs_a_key_unless_it_is_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *names: True)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert "WANDB_MODE=offline" in message(folder, "logging.wandb.enabled=true")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "x")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            make_plan(load_config(write_config(folder), ["logging.wandb.enabled=true"]), 1)


@pytest.mark.parametrize("backend", ["fused", "split"])
def test_kernels_need_a_gpu(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text = message(folder, f"model.attention_backend={backend}")
    assert text.startswith(f"model.attention_backend: expected auto or reference here, got {backend} (its kernels need")


def test_fp8_slots_need_a_gpu_that_reads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = "model.depth.slot_dtype=fp8"
    text = message(folder, fp8, "model.attention_backend=fused")
    assert (
        text == "model.attention_backend: expected auto, split or reference with model.depth.slot_dtype: fp8, got fused"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setitem(make_plan.__globals__, "this_machine", lambda: a_gpu(80))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 0))
    text = message(folder, fp8)
    assert text.startswith(
        "model.depth.slot_dtype: expected null on this GPU, got fp8 (e4m3 needs compute capability 8.9"
    )
    for overrides in (["model.attention_backend=reference"], ["model.attention_backend=auto"]):
        make_plan(load_config(write_config(folder), overrides), 1)
    make_plan(load_config(write_config(folder), [fp8, "model.attention_backend=reference"]), 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 9))
    make_plan(load_config(write_config(folder), [fp8]), 1)


def test_batch_not_divisible_by_ranks(folder: Path) -> None:
    text = message(folder, world_size=4)
    assert "train.global_batch_size: expected a multiple of train.microbatch_size x processes (2 x 4), got 4" == text


def test_a_good_configuration_passes(folder: Path) -> None:
    assert make_plan(load_config(write_config(folder)), 2).steps == 12


def data_error(folder: Path, *overrides: str) -> str:
    config = load_config(write_config(folder), overrides)
    with pytest.raises(UserError) as caught:
        build_training_data(config.data, load_tokenizer(config.data.tokenizer), config.train.sequence_length)  # type: ignore[arg-type]
    return str(caught.value)


def test_missing_and_unreadable_text(folder: Path) -> None:
    assert "data.text" in data_error(folder, "data.text=[nowhere]") and "nowhere" in data_error(
        folder, "data.text=[nowhere]"
    )
    (folder / "latin").mkdir(exist_ok=True)
    (folder / "latin" / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert "UTF-8 text in" in data_error(folder, f"data.text=[{folder}/latin]")
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"body": "no text"}\n')
    assert "line 2" in data_error(folder, f"data.text=[{folder}/rows.jsonl]")


def token_files(folder: Path, ids: list[int], manifest: dict[str, Any]) -> Path:
    folder.mkdir()
    np.array(ids, dtype=np.uint16).tofile(folder / "part.npy")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "part.npy"


def test_token_files_must_match_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = load_tokenizer(
        load_config(write_config(folder), [f"data.tokenizer={make_tokenizer(tmp_path / 'o.json', 400)}"]).data.tokenizer  # type: ignore[arg-type]
    )
    wrong_maker = token_files(tmp_path / "a", [1, 2, 3], {"tokenizer": other.describe()})
    text = data_error(folder, "data.text=null", f"data.paths=[{wrong_maker}]")
    assert "o.json" in text and "tokenizer.json" in text and "the tokenizer that made" in text
    too_large = token_files(tmp_path / "b", [1, 999], {})
    text = data_error(folder, "data.text=null", f"data.paths=[{too_large}]")
    assert "up to 999" in text and "320 tokens" in text
    odd = token_files(tmp_path / "c", [1, 2], {})
    odd.write_bytes(odd.read_bytes() + b"x")
    assert "whole uint16 token ids" in data_error(folder, "data.text=null", f"data.paths=[{odd}]")
    assert "token files that exist" in data_error(folder, "data.text=null", f"data.paths=[{tmp_path}/none*.npy]")


def test_mixes(folder: Path) -> None:
    wrong = data_error(
        folder, "data.text=null", "data.mix=OLMoE-mix-0842", "data.tokenizer=dolma2", "data.base_dir=/nowhere"
    )
    assert "did you mean 'OLMoE-mix-0824'?" in wrong
    absent = data_error(
        folder, "data.text=null", "data.mix=OLMoE-mix-0824", "data.tokenizer=dolma2", "data.base_dir=/nowhere"
    )
    assert "data.base_dir" in absent and "/nowhere" in absent
    assert "data.base_dir" in data_error(folder, "data.text=null", "data.mix=OLMoE-mix-0824", "data.tokenizer=dolma2")


def test_broken_yaml_and_circles(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [unclosed")
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, word in (
        ("broken", "readable YAML"),
        ("a", "circle"),
        ("list", "sections"),
        ("absent", "existing YAML file"),
    ):
        with pytest.raises(UserError, match=word):
            load_config(tmp_path / f"{name}.yaml")


def test_a_typo_in_the_file_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean .*moda_700m.yaml"):
        load_config(ROOT / "configs" / "moda_700.yaml")


def test_null_removes_a_section_of_the_base(tmp_path: Path) -> None:
    plain = load_config(ROOT / "configs" / "olmo2_demo.yaml")
    assert plain.model.depth is None and plain.model.d_model == 128


def test_another_mechanism_replaces_the_section_of_the_base() -> None:
    other = load_config(ROOT / "configs" / "moda_700m.yaml", ["model.depth.mechanism=denseformer"])
    assert other.model.depth is not None and other.model.depth.to_plain() == {"mechanism": "denseformer", "dilation": 1}
    same = load_config(ROOT / "configs" / "moda_700m.yaml", ["model.depth.mechanism=moda", "model.depth.ffn=false"])
    assert same.model.depth is not None and same.model.depth.to_plain()["ffn"] is False


def test_user_errors_reach_the_shell_without_a_traceback(folder: Path) -> None:
    failed = run(write_config(folder), "model.n_layer=3")
    assert failed.returncode == 2
    assert (
        failed.stderr.strip()
        .splitlines()[-1]
        .startswith("error: model.n_layer: expected a known key (did you mean 'n_layers'?")
    )
    assert "Traceback" not in failed.stderr and not (folder / "run").exists()


def test_text_is_tokenized_once_and_split_stably(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    tokenizer = load_tokenizer(config.data.tokenizer)  # type: ignore[arg-type]
    first = build_training_data(config.data, tokenizer, 32)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.npy")}
    build_training_data(config.data, tokenizer, 32)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.npy")} and len(times) == 2
    make_text(tmp_path / "text", 13)  # one more document leaves the others where they are
    second = build_training_data(config.data, tokenizer, 32)
    assert second.tokens is not None and first.tokens is not None and second.tokens >= first.tokens
    eos = tokenizer.config.eos_token_id
    assert all(np.fromfile(p, dtype=np.uint16)[-1] == eos for p in (tmp_path / "work").rglob("*.npy"))
