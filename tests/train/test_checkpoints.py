"""Checkpoints: their kinds, and crafted folders that must not run anything."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig

from moda.checkpoints import (
    CHECKSUMS,
    OwnCheckpointer,
    check_own,
    check_same_model,
    damage,
    find_resumable,
    kind_of,
    open_checkpoint,
    read_weights,
    write_checksums,
)
from moda.checkpoints.trust import _CONFIGS
from moda.config import RunConfig
from moda.errors import UserError
from moda.typed import to_dict
from tests.small_checkpoint import MODEL, run_config, save_checkpoint
from tests.tiny import make_tokenizer


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch harmed",))


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("harmed").exists(), "something in a checkpoint ran"


def olmo_config() -> TransformerConfig:
    return TransformerConfig.llama_like(vocab_size=64, n_layers=2, d_model=32, n_heads=2, qk_norm=True)


@pytest.fixture(scope="module")
def module() -> TransformerTrainModule:
    model = olmo_config().build(init_device="cpu")
    config = TransformerTrainModuleConfig(rank_microbatch_size=64, max_sequence_length=32, optim=AdamWConfig())
    built = config.build(model, device=torch.device("cpu"))
    assert isinstance(built, TransformerTrainModule)
    return built


@pytest.fixture
def own(tmp_path: Path, module: TransformerTrainModule) -> Path:
    """A checkpoint as the trainer writes it: weights, optimizer, trainer's state, checksums."""
    import random

    import numpy as np

    folder = tmp_path / "run" / "step5"
    rng = {
        "python": {"version": (3, 11), "state": random.getstate()},
        "numpy": {"version": (2, 0), "state": np.random.get_state()},
        "torch": {"version": (2, 13), "state": torch.get_rng_state()},
    }
    OwnCheckpointer(tmp_path / "work").save(folder, module, {"global_step": 5, "rng": rng, "callbacks": {}})
    (folder / "config.json").write_text(json.dumps({"model": {"block": {}}}))
    write_checksums(folder)
    return folder


def load(folder: Path, module: TransformerTrainModule) -> dict[str, Any]:
    state = OwnCheckpointer(folder.parents[1] / "work").load(
        folder, module, load_trainer_state=True, load_optim_state=True
    )
    assert state is not None
    return state


def test_kinds(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    save_checkpoint(tmp_path / "run" / "step2", run_config(tokenizer))
    save_checkpoint(tmp_path / "run" / "step10", run_config(tokenizer))
    assert kind_of(tmp_path / "run" / "step2") == "moda"
    contents = {
        "olmo-core": {"model": {"block": {}}},
        "huggingface": {"model_type": "llama"},
        "export": {"model_type": "moda", "model": {}},
    }
    for kind, config in contents.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if kind == "olmo-core":
            (folder / "model_and_optim").mkdir()
        assert kind_of(folder) == kind
    with pytest.raises(UserError, match="it has step2, step10"):
        kind_of(tmp_path / "run")
    with pytest.raises(UserError, match="an existing checkpoint folder"):
        kind_of(tmp_path / "nowhere")
    for config in ([], {"model": 3}, {"other": {}}):
        (tmp_path / "olmo-core" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="checkpoint"):
            kind_of(tmp_path / "olmo-core")


@pytest.mark.parametrize(
    "model",
    [
        {
            "block": {
                "_CLASS_": "olmo_core.distributed.checkpoint.get_checkpoint_metadata",
                "dir": "evil/model_and_optim",
            }
        },
        {"_CLASS_": "olmo_core.io.clear_directory", "dir": "precious"},
        {"block": {"sequence_mixer": [{"_CLASS_": "olmo_core.config.Config.from_file", "path": "x"}]}},
        {"block": {"_CLASS_": ["olmo_core.nn.attention.AttentionConfig"]}},
        {"block": {"_CLASS_": "olmo_core.nn.attention.AttentionConfig.from_file"}},
        {"block": {"_CLASS_": None}},
    ],
    ids=lambda m: str(m)[:60],
)
def test_classes_of_a_configuration_are_a_fixed_list(model: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "step1"
    (folder / "model_and_optim").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "evil" / "model_and_optim").mkdir(parents=True)
    (tmp_path / "evil" / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    (folder / "config.json").write_text(json.dumps({"model": model}))
    with pytest.raises(UserError, match="classes of OLMo-core"):
        open_checkpoint(folder)
    assert (tmp_path / "precious" / "file").exists()


def test_the_listed_classes_are_configurations() -> None:
    import importlib

    from olmo_core.config import Config

    for name in _CONFIGS:
        owner, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(owner), attribute)
        assert issubclass(found, Config) and f"{found.__module__}.{found.__name__}" == name


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"a":' * 90 + "1" + "}" * 90, "[" * 100_000, '{"model": ' + "9" * 5000 + "}"]
)
def test_odd_json_is_one_error(text: str, own: Path) -> None:
    (own / "config.json").write_text(text)
    with pytest.raises(UserError):
        open_checkpoint(own)
    (own / CHECKSUMS).write_text(text)
    assert damage(own) == f"{CHECKSUMS} is damaged"


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"a": 3},
        {"a": {"bytes": "x", "crc32": 1}},
        {"a": {}},
        {"a": {"bytes": float("inf"), "crc32": "1"}},
        {"a" * 300: {"bytes": 1, "crc32": "1"}},
        {"../a": {"bytes": 1, "crc32": "1"}},
    ],
)
def test_damaged_checksums(table: dict[str, Any], own: Path) -> None:
    assert damage(own) is None and find_resumable(str(own.parent)) == own
    (own / CHECKSUMS).write_text(json.dumps(table))
    assert damage(own) == f"{CHECKSUMS} is damaged"
    with pytest.raises(UserError, match="damaged ones only: step5"):  # a new run would write over what is left
        find_resumable(str(own.parent))
    (own / CHECKSUMS).unlink()
    assert find_resumable(str(own.parent)) is None  # a first save that was cut short


def test_own_state_comes_back(own: Path, module: TransformerTrainModule) -> None:
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    with torch.no_grad():
        for p in module.model.parameters():
            p.zero_()
    state = load(own, module)
    assert state["global_step"] == 5 and torch.equal(state["rng"]["torch"]["state"], torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in module.model.named_parameters())
    weights = read_weights(own)
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_forged_tables_states_and_shards_run_nothing(own: Path, module: TransformerTrainModule, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(own, tmp_path / name / "step5"))

    table = copy("table")
    (table / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    trainer = copy("trainer")
    torch.save({"global_step": Harmful()}, trainer / "train" / "rank0.pt")
    shards = copy("shards")  # every entry of every shard becomes a pickle
    metadata = pickle.loads((own / "model_and_optim" / ".metadata").read_bytes())
    torch.save(Harmful(), tmp_path / "harm")
    forged = (tmp_path / "harm").read_bytes()
    for file in (shards / "model_and_optim").glob("*.distcp"):
        file.write_bytes(forged)
    for entry in metadata.storage_data.values():
        entry.offset, entry.length = 0, len(forged)
    (shards / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(metadata))
    outside = copy("outside")
    for entry in metadata.storage_data.values():
        entry.relative_path = "../../../harm"
    (outside / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(metadata))
    for folder, message in (
        (table, "table of contents"),
        (trainer, "numbers, strings and tensors alone"),
        (shards, "a checkpoint of this run"),
        (outside, "a checkpoint of this run"),
    ):
        write_checksums(folder)
        with pytest.raises(UserError, match=message):
            load(folder, module)
        if folder != trainer:
            with pytest.raises(UserError):
                read_weights(folder)


@pytest.mark.parametrize("odd", ["sizes", "offsets", "type", "no data"])
def test_tables_that_do_not_fit_are_one_error(odd: str, own: Path) -> None:
    (own / CHECKSUMS).unlink()
    file = own / "model_and_optim" / ".metadata"
    table = pickle.loads(file.read_bytes())
    name = next(n for n in table.state_dict_metadata if n.startswith("model."))
    if odd == "sizes":
        table.state_dict_metadata[name].size = torch.Size([1 << 60, 1 << 60])
    elif odd == "offsets":
        for entry in table.storage_data.values():
            entry.offset = -1
    elif odd == "type":
        table.state_dict_metadata = []
    else:
        table.storage_data = None
    file.write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match="checkpoint"):
        read_weights(own)


def test_parts_that_overlap_are_not_a_whole(own: Path) -> None:
    """As many values as the tensor has, but all of them in its second half."""
    (own / CHECKSUMS).unlink()
    file = own / "model_and_optim" / ".metadata"
    table = pickle.loads(file.read_bytes())
    name = "model.embeddings.weight"
    (index,) = (i for i in table.storage_data if i.fqn == name)
    rows, *others = table.state_dict_metadata[name].size
    table.state_dict_metadata[name].size = torch.Size([2 * rows, *others])
    entry = table.storage_data.pop(index)
    for offset in (rows, -rows):
        at = torch.Size([offset, *[0] * len(others)])
        table.storage_data[dataclasses.replace(index, offset=at)] = entry
    file.write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match="all of model.embeddings.weight"):
        read_weights(own)


def test_shards_may_be_links_as_in_a_cache(own: Path, tmp_path: Path) -> None:
    expected = read_weights(own)
    for file in list((own / "model_and_optim").glob("*.distcp")):
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    assert all(torch.equal(expected[name], w) for name, w in read_weights(own).items())


def test_checkpoints_of_others_are_not_resumed_from(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = own.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    check_own(own)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_own(own)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 4321)
    with pytest.raises(UserError, match=rf"train.save_folder: expected checkpoints owned by .*{owner + 4321}"):
        check_own(own)


def test_the_old_layout_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "step10"
    config = run_config(make_tokenizer(tmp_path / "tokenizer.json"), sequence_length=64)
    save_checkpoint(folder, config)
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["depth_kv"] = {"attention": "reuse"}
    del settings["model"]["depth"]
    (folder / "config.json").write_text(json.dumps(settings))
    for read in (open_checkpoint, lambda path: check_same_model(path, config.model)):
        with pytest.raises(UserError, match="model.depth_kv .*use the version that saved it, or train again"):
            read(folder)


def test_a_checkpoint_of_another_slot_policy_is_refused_unless_asked_for(tmp_path: Path) -> None:
    def config(read: Any) -> RunConfig:
        return run_config(Path("none"), {**MODEL, "vocab_size": 64, "depth": {"mechanism": "moda", "read": read}})

    (tmp_path / "config.json").write_text(json.dumps(to_dict(config({"recent": 3}))))
    check_same_model(tmp_path, config({"recent": 3}).model)
    for read, words in (
        (
            "all",
            f"model.depth.read: expected {{'recent': 3}}, as in checkpoint {tmp_path}, got all .*load_other_reads=true",
        ),
        ({"recent": 4}, "model.depth.read.recent: expected 3, as in checkpoint .*, got 4"),
        ({"stride": 3}, "model.depth.read: expected {'recent': 3}, as in checkpoint .*, got {'stride': 3}"),
    ):
        with pytest.raises(UserError, match=words):
            check_same_model(tmp_path, config(read).model)
        check_same_model(tmp_path, config(read).model, other_reads=True)
    fp8 = run_config(
        Path("none"),
        {**MODEL, "vocab_size": 64, "depth": {"mechanism": "moda", "read": {"recent": 3}, "slot_dtype": "fp8"}},
    ).model
    with pytest.raises(
        UserError, match="model.depth.slot_dtype: expected None, as in checkpoint .*, got fp8 .*load_other"
    ):
        check_same_model(tmp_path, fp8)
    check_same_model(tmp_path, fp8, other_reads=True)
    with pytest.raises(UserError, match="model.depth.ffn: expected True"):
        other = {"mechanism": "moda", "read": "all", "ffn": False}
        check_same_model(
            tmp_path, run_config(Path("none"), {**MODEL, "vocab_size": 64, "depth": other}).model, other_reads=True
        )
