"""Results that were there before, results that are damaged or unequal, and what is refused before anything is computed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import moda_cli
from moda.errors import UserError
from moda_evals import run as evals_run
from moda_evals.compare import compare, comparison_table, markdown, plot, remarks
from moda_evals.model import checkpoint_label
from moda_evals.report import notes
from moda_evals.results import read_results
from moda_evals.run import Options, evaluate, evaluate_all
from moda_evals.tasks import TASKS, JsonlTask
from tests.small_checkpoint import run_config, save_checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Document {i} has a few words, and a word more. " * (i + 2), encoding="utf-8")
    return {"mine": [str(folder)]}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = Options(tasks=("copa", "piqa"), text=text, window=32, limit=8)
    return evaluate(str(checkpoint), options, tmp_path_factory.mktemp("whole"))


def test_one_suite_after_another(checkpoint: Path, text: dict, whole: dict, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "moda_evals")
    evaluate(str(checkpoint), Options(suite="perplexity", text=text, window=32, limit=8), tmp_path)
    evaluate(str(checkpoint), Options(suite="downstream", tasks=("piqa",), limit=8), tmp_path)
    both = evaluate(str(checkpoint), Options(suite="downstream", tasks=("copa",), limit=8), tmp_path)
    assert "the earlier figures of mine, PIQA are kept" in caplog.text
    assert json.loads(json.dumps(both)) == read_results(tmp_path)
    for suite in ("perplexity", "downstream"):
        assert set(both[suite]) == set(whole[suite])
        for name, entry in whole[suite].items():
            assert {**both[suite][name], "seconds": 0} == {**entry, "seconds": 0}


def test_earlier_results_of_other_settings(
    checkpoint: Path, tokenizer_file: Path, text: dict, tmp_path: Path, caplog
) -> None:
    folder = tmp_path / "run" / "step10"
    shutil.copytree(checkpoint, folder)
    options = Options(suite="perplexity", text=text, window=32, limit=3)
    evaluate(str(folder), options, tmp_path / "out")
    other = evaluate(str(folder), Options(suite="downstream", tasks=("copa",), limit=4), tmp_path / "out")
    assert not other["perplexity"] and "measured with other settings: limit 3 -> 4" in caplog.text
    shutil.rmtree(folder)
    save_checkpoint(folder, run_config(tokenizer_file), seed=9)
    other = evaluate(str(folder), options, tmp_path / "out")
    assert not other["downstream"] and "checkpoint " in caplog.text


def test_earlier_figures_of_a_task_whose_questions_have_changed(
    checkpoint: Path, text: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    file = tmp_path / "capitals.jsonl"
    file.write_text('{"context": "France:", "choices": [" Paris", " Rome"], "label": 0}\n')
    monkeypatch.setitem(TASKS, "capitals", JsonlTask("capitals", "Capitals", "acc", "", file))
    evaluate(str(checkpoint), Options(suite="downstream", tasks=("capitals",)), tmp_path / "out")
    perplexity = Options(suite="perplexity", text=text, window=32)
    assert set(evaluate(str(checkpoint), perplexity, tmp_path / "out")["downstream"]) == {"capitals"}
    file.write_text('{"context": "Italy:", "choices": [" Paris", " Rome"], "label": 1}\n')
    assert not evaluate(str(checkpoint), perplexity, tmp_path / "out")["downstream"]
    assert "the earlier figures of capitals are dropped: its questions have changed" in caplog.text


def test_an_export_has_a_model_card_with_the_results_of_its_checkpoint(
    checkpoint: Path, whole: dict, tmp_path: Path, caplog
) -> None:
    (tmp_path / checkpoint_label(checkpoint)).mkdir()
    file = tmp_path / checkpoint_label(checkpoint) / "results.json"
    file.write_text(json.dumps(whole))
    assert moda_cli.main(["export", str(checkpoint), str(tmp_path / "a"), "--results", str(tmp_path)]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    parameters = sum(w.numel() for w in load_file(tmp_path / "a" / "model.safetensors").values())
    for row in (
        "| training steps | 10 |",
        f"| parameters | {parameters:,} (float32) |",
        "| depth slots | 4 (2.0 read per layer) |",
    ):
        assert row in card
    assert (
        "trust_remote_code=True" in card
        and "COPA" in card
        and f"{whole['perplexity']['mine']['perplexity']:.2f}" in card
    )
    assert str(checkpoint.parent) not in card  # no path of the machine that trained
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    file.write_text(json.dumps({**whole, "measured_with": {"checkpoint": "another"}}))
    assert moda_cli.main(["export", str(checkpoint), str(tmp_path / "b"), "--results", str(tmp_path)]) == 0
    assert "Evaluation" not in (tmp_path / "b" / "README.md").read_text() and "is left out" in caplog.text


def test_sets_with_different_windows_have_no_average_and_say_so(whole: dict) -> None:
    from moda_evals.sets import PAPER_SETS
    from moda_evals.suites import PERPLEXITY

    entry = whole["perplexity"]["mine"]
    entries = {name: {**entry, "title": name} for name in PAPER_SETS}
    assert PERPLEXITY.average(entries) == pytest.approx(entry["perplexity"])
    entries["pile"] = {**entries["pile"], "window": {"size": 16, "stride": 8, "head": False}}
    assert PERPLEXITY.average(entries) is None
    note = notes([{**whole, "perplexity": entries}], False)[0]
    assert "window 16, stride 8 for pile" in note and "window 32, stride 16 for c4, ice" in note


def change(results: dict, suite: str, name: str, **changes: Any) -> dict:
    return {**results, suite: {**results[suite], name: {**results[suite][name], **changes}}}


def test_unequal_results(whole: dict) -> None:
    other = {**whole, "downstream": {k: v for k, v in whole["downstream"].items() if k == "copa"}}
    other = change(other, "downstream", "copa", n=4, correct="0101")
    assert remarks(whole, other) == [
        f"only in A ({whole['model']['label']}): PIQA",
        "no interval for COPA, measured on different data: n 8 and 4",
    ]
    same_size = change(whole, "downstream", "copa", source="another file's digest")
    assert remarks(whole, same_size) == [
        "no interval for COPA, measured on different data: source None and another file's digest"
    ]
    assert {d.name: d.low is None for d in compare(whole, same_size)}.items() >= {"copa": True, "piqa": False}.items()
    differences = compare(whole, other)
    assert "PIQA" in str(comparison_table(whole, other, differences).caption)
    assert "only in A" in markdown(whole, other, differences) and not remarks(whole, whole)
    assert [d.low is None for d in differences] == [False, True]
    nothing = {**whole, "perplexity": {}, "downstream": {}}
    with pytest.raises(UserError, match="tasks or sets in common, got only in A .*: mine, COPA, PIQA"):
        compare(whole, nothing)
    for draws in (0, -1, 10**9):
        with pytest.raises(UserError, match="--draws"):
            compare(whole, other, draws=draws)


def test_every_damage_is_one_error(whole: dict, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    texts = ["", "{", "[]", "null", "[" * 100_000, '{"format": ' + "1" * 5000 + "}", '{"format": 1}', "\ud800"]
    broken: list[dict] = [
        {**whole, key: value} for key in ("model", "perplexity", "skipped") for value in ([], None, 3)
    ]
    broken += [{**whole, "downstream": {"copa": value}} for value in ({}, [], "x", None)]
    for key in ("n", "correct", "accuracy", "title", "metric", "bits_per_byte", "truncated"):
        entry = {k: v for k, v in whole["downstream"]["copa"].items() if k != key}
        broken += [{**whole, "downstream": {"copa": entry}}] if key != "bits_per_byte" else []
        if key != "truncated":
            broken.append(change(whole, "downstream", "copa", **{key: ["x"]}))
    broken.append(change(whole, "perplexity", "mine", window={}))
    for documents in ({}, [], {"loss": [], "tokens": []}, {"loss": ["a"] * 4, "tokens": [1] * 4}, {"loss": 3}):
        broken.append(change(whole, "perplexity", "mine", documents=documents))
    broken.append(change(whole, "downstream", "copa", accuracy=10**400))
    broken.append({**whole, "model": {"label": 3, "parameters": "many"}})
    for content in [*texts, *map(json.dumps, broken)]:
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match="results: expected"):
            read_results(file)
    with pytest.raises(UserError, match="results: expected an existing results.json"):
        read_results(tmp_path / "none")


def test_all_checkpoints_are_opened_first(
    checkpoint: Path, text: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be measured")

    for name in ("evaluate_set", "evaluate_task", "build_model"):
        monkeypatch.setattr(evals_run, name, measure)
    damaged = tmp_path / "damaged" / "step10"
    shutil.copytree(checkpoint, damaged)
    (damaged / "config.json").write_text("{")
    options = Options(text=text, tasks=("copa",))
    for bad in (damaged, tmp_path / "none" / "step1", tmp_path):
        with pytest.raises(UserError, match="checkpoint"):
            evaluate_all([str(checkpoint), str(checkpoint), str(bad)], options, tmp_path / "out")
    for bad_options, key in (
        (Options(text={"x": text["mine"] + [str(tmp_path / "nothing")]}), "that exist"),
        (Options(text=text, window=9000), "--window"),
        (Options(text=text, window=16, stride=17), "--stride"),
        (Options(text=text, token_files={"mine": [str(tmp_path / "*.npy")]}), "different name"),
        (Options(tokenizer=str(tmp_path / "none.json"), text=text), "tokenizer"),
    ):
        with pytest.raises(UserError, match=key):
            evaluate_all([str(checkpoint)], bad_options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--output: expected a folder that can be written"):
            evaluate_all([str(checkpoint)], options, output)
        with pytest.raises(UserError, match="--output"):
            evaluate(str(checkpoint), options, output)


def test_options_have_ranges() -> None:
    for name in ("limit", "batch_tokens", "context_length", "window", "stride"):
        for value in (0, -5):
            with pytest.raises(UserError, match="expected a number >= 1"):
                Options(**{name: value})
    for name, value in (
        ("device", "foo"), ("device", "cuda:99"), ("device", ""), ("device", "meta"), ("dtype", "int8"),
        ("suite", "everything"), ("tasks", ("pica",)), ("sets", ("c5",)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name}: expected"):
            Options(**{name: value})
    with pytest.raises(UserError, match="--batch-size"):
        Options(batch_tokens=0)


def test_plot_keeps_its_title_inside(whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    long = {**whole, "model": {**whole["model"], "label": "an_ablation_with_a_long_and_telling_name-step95368"}}
    for suites in (["downstream"], ["perplexity", "downstream"]):
        a, b = ({**r, **{s: {} for s in ("perplexity", "downstream") if s not in suites}} for r in (long, long))
        plot(a, b, compare(a, b, paper=("OLMo2-700M", "MoDA-700M")), tmp_path / f"{len(suites)}.png")
        figure = figures[-1]
        title = figure._suptitle.get_window_extent(figure.canvas.get_renderer())
        assert title.x0 >= 0 and title.x1 <= figure.bbox.width and title.y1 <= figure.bbox.height
        assert all(title.y0 >= axis.get_tightbbox().y1 for axis in figure.axes)
    for name in ("x.xyz", "x"):
        with pytest.raises(UserError, match="--plot: expected a file name that ends in one of .*png"):
            plot(long, long, compare(long, long), tmp_path / name)
