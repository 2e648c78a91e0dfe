"""Nonsense for every key of the configuration and every option of every command: each ends well or in one clean error.

What is accepted is stopped before any work: configurations are planned, commands find no checkpoint, no folder, no such mix.
"""

from __future__ import annotations

import argparse
import importlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import moda_cli
from moda.config import RunConfig, read_config
from moda.config.reference import keys
from moda.data.prepare import load_options
from moda.data.prepare.options import PrepareOptions
from moda.errors import UserError
from moda.train.plan import make_plan
from moda.typed import from_dict
from moda_cli._main import COMMANDS
from tests.tiny import tiny_config, write_config

TEXTS = [
    "", " ", "-1", "0", "9" * 5000, "1e999", "nan", "-inf", "x" * 5_000, "a\0b", "a\nb", "\ud800", "[", "[a, 1]", "{a: 1}",
    "[[[]]]", "/", "/nowhere/x", "/dev/null", "true", "null", "???", "${x}", "--", "-", "1:30", "0x10", "é" * 300, "[red]", "%s",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 10**5000, 2**63, float("nan"), float("-inf"), 1e308, "", "x" * 5_000, "a\0b", "\ud800", "${x}", "???",
    b"x", [], {}, [[]], {"a": {"b": []}}, {1: 2}, ["a\0"], [None], {"": None}, [10**400],
    1.5,
]  # fmt: skip


def check(error: UserError, what: str) -> None:
    text = str(error)
    assert text.isprintable() and len(text) < 3000 and ": expected " in text, what


def paths(cls: type) -> list[str]:
    """Keys as they are typed."""
    plain = (re.sub(r" \(mechanism: \w+\)", "", key.path) for key in keys(cls))
    return sorted({path.replace("NAME", "c") for path in plain})


def nest(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {first: nest(rest, value) if rest else value}


def merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict) or not above:
        return above
    return {**below, **{k: merged(below.get(k), v) for k, v in above.items()}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODA_TRACEBACK", raising=False)


def test_every_key_of_a_run(tmp_path: Path) -> None:
    write_config(tmp_path)
    good, rng = tiny_config(tmp_path), random.Random(0)
    before = sorted(tmp_path.rglob("*"))
    refused = 0
    for path in paths(RunConfig):
        cases = [(f"{path}={text}", None) for text in TEXTS] + [(path, value) for value in VALUES]
        for given, value in rng.sample(cases, 14):
            try:
                change = read_config(None, [given]) if "=" in given else nest(path, value)
                make_plan(from_dict(RunConfig, merged(good, change)), 1)
            except UserError as e:
                refused += 1
                check(e, given)
                assert e.key.split(".")[0].split("[")[0] in (*path.split("."), "model", "train", "optim"), (
                    given[:200],
                    str(e),
                )
    assert refused > 700 and sorted(tmp_path.rglob("*")) == before


def test_every_key_of_a_preparation() -> None:
    good = {"output": "out", "sources": {"c": {"path": "a.txt"}}}
    refused, rng = 0, random.Random(0)
    for path in paths(PrepareOptions):
        for text in rng.sample(TEXTS, 10):
            try:
                load_options(None, ["output=out", "sources.c.path=a.txt", f"{path}={text}"])
            except UserError as e:
                refused += 1
                check(e, path)
        for value in rng.sample(VALUES, 10):
            try:
                from_dict(PrepareOptions, merged(good, nest(path, value)))
            except UserError as e:
                refused += 1
                check(e, path)
    assert refused > 250 and not list(Path().iterdir())


#: Arguments with which a command comes to its checks and then finds nothing to work on.
STARTS = {
    "train": ["tiny.yaml", "--dry-run", "model.n_layers=0"],
    "plan": ["tiny.yaml", "model.n_layers=0"],
    "eval": ["nowhere"],
    "compare": ["nowhere", "nowhere"],
    "generate": ["nowhere", "prompt"],
    "export": ["nowhere", "out"],
    "choose": ["nowhere", "out"],
    "prepare tokenize": ["output=out", "sources.c=nowhere"],
    "prepare mirror": ["no-such-mix", "mirror", "--dry-run"],
    "prepare inspect": ["nowhere"],
    "bench": [],
    "sweep": ["nowhere.yaml"],
    "visualize": ["nowhere", "--text", "a"],
    "report": ["nowhere"],
    "draw": ["out.png", "--config", "nowhere.yaml"],
}


def options(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    """Every argument of a command and of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child, inner in action.choices.items():
                yield from options(inner, f"{name} {child}")
        elif action.nargs != 0:
            yield name, action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny_config(Path())))
    if command == "bench":  # nothing is measured
        monkeypatch.setattr("moda_kernels.benchmarks.registry.run", lambda args: 0)
    for name, action in options(importlib.import_module(f"moda_cli.{command}").parser(), command):
        start = STARTS[name if name in STARTS else command]
        for text in TEXTS if start != [] else TEXTS[:10]:
            if action.option_strings:
                words = [*start, f"{action.option_strings[-1]}={text}"]
            else:  # in place of the first argument, or beside the others
                words = [text, *start[1:]]
            try:
                code = moda_cli.main([*name.split(), *words])
            except SystemExit as stopped:
                code = stopped.code
            err = capsys.readouterr().err
            assert code in (0, 2) and "Traceback" not in err and "(traceback" not in err, (words, err[-2000:])
            if code == 2 and "usage:" not in err and command != "bench":
                assert err.startswith("error: ") and err.count("\n") == 1, (words, err[-2000:])
    assert {p.name for p in Path().iterdir()} <= {"tiny.yaml", "mirror"}
