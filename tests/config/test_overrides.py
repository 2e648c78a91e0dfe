"""What is typed for a key is read by the key's type; what YAML would silently take for something else is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from moda.config import load_config, read_config, to_yaml
from moda.data.prepare import load_options
from moda.errors import UserError
from tests.tiny import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize(
    "text", ["runs/a #2", "no", "1e3", "010", "12:00:00", "{x}", "[a]/b", "'q'", "a: b", "~", "true", "é ü"]
)
def test_text_is_what_was_typed(config: Path, text: str) -> None:
    typed = load_config(
        config, [f"train.save_folder={text}", f"description={text}", f"eval.downstream.tasks=[{'x, no, 1e3'}]"]
    )
    assert (typed.train.save_folder, typed.description) == (text, text)
    assert typed.eval.downstream is not None and typed.eval.downstream.tasks == ["x", "no", "1e3"]
    saved = config.with_name("config.yaml")
    saved.write_text(to_yaml(typed), encoding="utf-8")
    assert load_config(saved) == typed


def test_values_of_other_types(config: Path) -> None:
    typed = load_config(config, [
        "optim.lr=1e-3", "train.max_steps=null", "train.max_tokens=4e9", "train.compile=no", "optim.betas=[0.8, .9]",
        "train.load_path=null", "model.depth={ffn: no}", "name=null", "data.text=[a b, 'c #1']", "parallel.data=ddp",
    ])  # fmt: skip
    assert (typed.optim.lr, typed.optim.betas, typed.train.max_tokens) == (1e-3, (0.8, 0.9), 4_000_000_000)
    assert typed.train.compile is False and typed.train.load_path is None and typed.name == "null"
    assert typed.data.text == ["a b", "c #1"] and typed.parallel.data.value == "ddp"
    assert typed.model.depth is not None and typed.model.depth.to_plain()["ffn"] is False
    assert typed.model.depth.to_plain()["attention"] == "reuse"  # merged with the file's section


def test_another_policy_takes_the_place_of_the_file_s(config: Path) -> None:
    file = config.with_name("reads.yaml")
    file.write_text("base: tiny.yaml\nmodel: {depth: {read: {first_recent: {first: 1, recent: 2}}}}\n")
    for override, read in (
        ("model.depth.read={stride: 3}", {"stride": 3}),
        ("model.depth.read.learned=3", {"learned": {"top": 3, "of": "all"}}),
        ("model.depth.read.first_recent.first=4", {"first_recent": {"first": 4, "recent": 2}}),
    ):
        depth = load_config(file, [override]).model.depth
        assert depth is not None and depth.to_plain()["read"] == read
    of = load_config(
        file, ["model.depth.read={learned: {top: 2, of: {recent: 4}}}", "model.depth.read.learned.of={stride: 2}"]
    )
    assert of.model.depth is not None and of.model.depth.to_plain()["read"] == {
        "learned": {"top": 2, "of": {"stride": 2}}
    }


def test_prepare_reads_overrides_in_the_same_way(tmp_path: Path) -> None:
    options = load_options(None, [
        "output=out #1", "sources.c=/x/C #1", "sources.no=a", "sources.off=[b, c d]", "sources.2024={path: p, field: no}",
        "slurm={time: 12:00:00, gres: null}", "slurm.partition=no", "slurm.mem_per_cpu_gb=2", "slurm.requeue=true",
    ])  # fmt: skip
    paths = {name: options.source(name).path for name in options.sources}
    assert paths == {"c": ["/x/C #1"], "no": ["a"], "off": ["b", "c d"], "2024": ["p"]} and options.output == "out #1"
    assert options.source("2024").field == "no"
    assert options.slurm == {"time": "12:00:00", "gres": None, "partition": "no", "mem_per_cpu_gb": 2, "requeue": True}


@pytest.mark.parametrize(
    "text, words",
    [
        ("sources: {no: a, off: b}", ["no as a key", "quotes"]),
        ("sources: {True: a}", ["True as a key"]),
        ("slurm: {time: 12:00:00}", ["12:00:00", "base 60", "quotes"]),
        ("slurm: {time: 1:30.5}", ["1:30.5", "base 60"]),
        ("shard_tokens: 0100", ["0100", "base 8"]),
        ("output: a\noutput: b", ["output stands twice", "line 2"]),
        ("minhash:\n  buckets: 1\n  buckets: 1", ["buckets stands twice"]),
        ("a: &x [1]\nb: *x", ["aliases"]),
        ("a: &x [*x]", ["aliases"]),
        ("a: &x [1]\nb: &y [*x, *x]\nc: [*y, *y]", ["aliases"]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("a: " + "{a: " * 5000, ["nested too deeply"]),
        ("shard_tokens: " + "9" * 5000, ["4300 digits"]),
        ("shard_tokens: 1e30", ["shard_tokens", "64 bits"]),
        ("validation_fraction: .nan", ["validation_fraction", "finite"]),
        ("output: ${oc.env:HOME}/x", ["output", "interpolated", "${oc.env:HOME}/x"]),
        ("output: ???", ["output", "missing"]),
        ("output: ''", ["output", "empty"]),
        ("output: \"a\\0b\"", ["output", "NUL"]),
        ("output: \"\\ud800\"", ["output", "Unicode"]),
        ("output: !!binary aGk=", ["output", "a string"]),
        ("output: !!python/name:os.system x", ["python/name"]),
        ("slurm: {time: !!set {a: null}}", ["slurm.time"]),
        ("!!map output", ["mapping node"]),
        ("? [a]\n: b", ["a list or mapping as a key"]),
        ("base: 3", ["base in", "3"]),
        ("base: [{}]", ["base in"]),
        ("a: 1\n---\nb: 2", ["single document"]),
        ("a: \x00", ["readable YAML"]),
        ("12", ["sections", "int"]),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "prepare.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_options(str(path), ["output=x"] if "output" not in text else [])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lr=???", ["optim.lr", "???"]),
        ("train.save_folder=???", ["train.save_folder", "missing"]),
        ("train.save_folder=${name}", ["train.save_folder", "interpolated"]),
        ("optim.lr=${optim.eps}", ["optim.lr", "${optim.eps}"]),
        ("data.text=[a, '${x}']", ["data.text", "${x}"]),
        ("train.save_folder=", ["train.save_folder", "empty"]),
        ("train.max_steps=1:30", ["train.max_steps", "1:30"]),
        ("train.max_steps=nan", ["train.max_steps", "nan"]),
        ("train.max_steps=null", ["train.max_tokens", "neither"]),
        ("optim.lr=null", ["optim.lr", "a number > 0"]),
        ("optim.lr=" + "9" * 5000, ["optim.lr", "5,000 characters"]),
        ("optim=3", ["optim", "a section"]),
        ("a..b=3", ["override", "key=value"]),
    ],
)
def test_overrides_that_are_refused(config: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config, [override])
    for word in words:
        assert word in str(caught.value)


def test_files_keep_their_types(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: 1.5e3\nc: 2024-01-01\nd: 1_000\ne: '010'\n1: x\nf: .5e-1\ng: 0.5\n")
    read: dict[str, Any] = read_config(tmp_path / "a.yaml")
    assert read == {"a": 1e-3, "b": 1500.0, "c": "2024-01-01", "d": 1000, "e": "010", "1": "x", "f": 0.05, "g": 0.5}


def test_sections_made_in_python_are_checked_too(config: Path) -> None:
    good = load_config(config)
    with pytest.raises(UserError, match=r"optim.lr: expected a number > 0, got -1"):
        dataclasses.replace(good.optim, lr=-1)
    with pytest.raises(UserError, match=r"optim.betas\[1\]: expected a number from 0 to below 1, got 1.0"):
        dataclasses.replace(good.optim, betas=(0.9, 1))
