"""Reports: every figure against one worked out here, damaged runs, names that are markup, and the page in a browser."""

from __future__ import annotations

import base64
import copy
import csv
import gzip
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moda.config import load_config
from moda.errors import UserError
from moda.model import transformer_config
from moda.report import FILES, write_report
from moda.report.charts import _draw_ranking
from moda.report.paper import PAPER_TABLES
from moda.report.runs import _flatten, find_runs
from moda.report.tables import build_tables, markdown_table
from moda.report.variants import Estimate, choose_baseline, differences, speedup, variants
from moda.typed import to_dict
from tests.tiny import ROOT, environment

MODA = {"mechanism": "moda", "attention": "reuse", "ffn": True}
SETTINGS: dict[str, Any] = {
    "name": "run",
    "model": {"d_model": 32, "n_layers": 3, "norm_placement": "post", "depth": None},
    "optim": {"lr": 1e-3},
    "train": {"sequence_length": 8, "global_batch_size": 4, "max_steps": 20, "max_tokens": None, "seed": 0},
}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_plotly = pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is not installed")


def write_run(
    folder: Path, losses: list, *, speed: float = 64.0, flops: int = 100, evals: dict | None = None, **changes: Any
) -> Path:
    """A run of 32 tokens per step; ``changes`` override sections; ``evals``: losses of a validation set by step."""
    settings = copy.deepcopy(SETTINGS)
    for section, values in changes.items():
        settings[section].update(values)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "plan.json").write_text(json.dumps({"parameters": 1_500_000, "flops_per_token": flops}))
    for name in ("train.log", "summary.json"):
        (folder / name).touch()
    with (folder / "metrics.jsonl").open("w") as f:
        for step, loss in enumerate(losses, 1):
            line = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "memory_gib": step / 10}
            line |= {"tokens_per_second": speed} if step > 1 else {}  # the first step has none
            line |= {"norm/layer0": 1.0, "norm/layer1": float(step)}
            line |= {"eval/c4/loss": evals[step]} if evals and step in evals else {}
            f.write(json.dumps(line) + "\n")
    return folder


def falling(start: float, slope: float, n: int = 20) -> list[float]:
    return [start - slope * step for step in range(1, n + 1)]


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "report.csv").open(newline="") as f:
        return {row["run"]: row for row in csv.DictReader(f)}


@needs_plotly
def test_figures_of_a_run(tmp_path: Path) -> None:
    losses = [5.0] * 57 + [3.0, 2.0, 1.0]
    folder = write_run(tmp_path / "a run", losses, train={"max_steps": 60}, evals={30: 3.0, 60: 2.0})
    write_report([folder], folder)
    assert all((folder / name).stat().st_size > 0 for name in FILES)
    (row,) = rows(folder).values()
    expected = {
        "parameters": 1.5e6, "FLOPs per token": 100, "tokens": 60 * 32, "training loss": 2.0, "c4 loss": 2.0,
        "c4 perplexity": math.exp(2), "tokens/s": 64, "peak memory, GiB": 6.0, "training time": 30.0,
    }  # fmt: skip
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    assert (row["run"], row["state"]) == ("a run", "finished")
    assert "| tokens/s | 64 |" in (folder / "report.md").read_text()


def test_tokens_are_those_seen_where_the_batch_size_was_changed(tmp_path: Path) -> None:
    """32 tokens per step to step 10, then 64; one step's figure is missing."""
    folder = write_run(tmp_path / "run", [1.0] * 15, train={"max_steps": None, "max_tokens": 640})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"tokens": 32 * line["step"] + 32 * max(line["step"] - 10, 0)} for line in lines]
    del lines[0]["tokens"], lines[13]["tokens"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = find_runs([folder])
    assert run.finished and list(run.tokens(np.array([1.0, 10, 14, 15]))) == [32, 320, 576, 640]
    assert run.seconds(np.array([10.0, 15]))[1] == 10.0  # at 64 tokens/s
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-2]))
    assert find_runs([folder])[0].state == "unfinished at step 13 of 640 tokens; no evaluations"


def test_student_t() -> None:
    for n, t in ((2, 12.7062), (3, 4.3027), (11, 2.2281), (61, 2.0003)):
        values = np.arange(n, dtype=float)
        assert Estimate.of(values).margin == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=1e-4)
    assert Estimate.of([1.0, math.nan]) == Estimate.of([1.0, math.inf]) and Estimate.of([1.0]).n == 1


def test_seeds_are_one_variant_and_differences_are_paired(tmp_path: Path) -> None:
    for seed, (plain, ours) in enumerate([(3.0, 2.9), (3.2, 3.0), (3.4, 3.1)]):
        write_run(tmp_path / f"plain-seed{seed}", [plain] * 20, train={"seed": seed})
        write_run(tmp_path / f"moda-seed{seed}", [ours] * 20, train={"seed": seed}, model={"depth": MODA})
    write_run(tmp_path / "moda-seed3", [1.0] * 19, train={"seed": 3}, model={"depth": MODA})  # is not finished
    (write_run(tmp_path / "unreadable", [1.0] * 20) / "config.yaml").unlink()
    *groups, unknown = variants(find_runs([tmp_path]))
    assert unknown.label == "unreadable"
    assert [(g.label, len(g.runs), len(g.finished)) for g in groups] == [("moda", 4, 3), ("plain", 3, 3)]
    base = choose_baseline(groups, None)
    assert base.label == "plain" and choose_baseline(groups, "moda-seed2").label == "moda"
    d = differences(groups[0], base, "loss")
    assert (d.mean, d.n) == (pytest.approx(-0.2), 3) and d.margin == pytest.approx(
        4.3027 * 0.1 / math.sqrt(3), rel=1e-4
    )
    assert base.final("loss").mean == pytest.approx(3.2)


def test_effective_speedup(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", falling(4, 0.05))  # 3.0 after 20 steps
    write_run(tmp_path / "fast", falling(4, 0.1), model={"depth": MODA}, flops=125, speed=32)  # 3.0 after 10
    write_run(tmp_path / "between", falling(4, 0.08), model={"n_layers": 4})  # 3.0 after 12.5
    write_run(tmp_path / "never", falling(4, 0.04), model={"n_layers": 5})
    write_run(tmp_path / "comes back", [2.0, *falling(4, 0.08)[1:]], model={"n_layers": 6})  # below at once, then above
    groups = {g.label: g for g in variants(find_runs([tmp_path]))}
    found = {name: speedup(group, groups["plain"]) for name, group in groups.items()}
    means = {name: [e.mean for e in ratios.values()] for name, (ratios, _) in found.items()}
    assert means["plain"] == pytest.approx([1, 1, 1])
    assert means["fast"] == pytest.approx([2, 2 / 1.25, 1])
    assert means["between"] == means["comes back"] == pytest.approx([1.6] * 3)
    assert found["never"][1] == 0 and found["fast"][1] == 1


def tables(folder: Path) -> dict[str, list[list[str]]]:
    groups = variants(find_runs([folder]))
    runs = [run for group in groups for run in group.runs]
    return {t.title: [list(row) for row in t.rows] for t in build_tables(runs, groups, choose_baseline(groups, None))}


def test_learning_rates(tmp_path: Path) -> None:
    for depth in (None, MODA):
        for lr, loss in ((1e-3, 3.0), (2e-3, 2.5), (4e-3, None)):
            write_run(tmp_path / f"{lr} {bool(depth)}", [loss] * 20, optim={"lr": lr}, model={"depth": depth})
    assert ["depth=moda", "3.0000", "2.5000", "not finite", "0.002"] in tables(tmp_path)["Learning rate"]


def test_each_mechanism_at_its_best_rate_against_the_plain_model_at_its_own(tmp_path: Path) -> None:
    finals = {  # by norm placement, depth and learning rate: the losses of both sets with seed 0; seed 1 has 0.1 less
        ("pre", False, 1e-3): (3.0, 5.0), ("pre", False, 2e-3): (2.0, 4.0), ("pre", True, 1e-3): (1.0, 4.0),
        ("pre", True, 2e-3): (1.5, 4.5), ("post", True, 1e-3): (1.0, 2.0),
    }  # fmt: skip
    for (placement, depth, lr), (c4, wiki) in finals.items():
        for seed in (0, 1):
            model = {"norm_placement": placement, "depth": MODA if depth else None, "d_model": 32}
            folder = tmp_path / f"{placement} {depth} {lr} seed{seed}"
            write_run(folder, falling(4, 0.1), model=model, optim={"lr": lr}, train={"seed": seed})
            file = folder / "metrics.jsonl"
            first, *between, last = file.read_text().splitlines()
            loss = {"eval/c4/loss": c4 - 0.1 * seed, "eval/wiki/loss": wiki - 0.1 * seed}
            start = json.dumps({**json.loads(first), "eval/c4/loss": 0.0})  # one set alone has no part in the mean
            file.write_text("\n".join([start, *between, json.dumps({**json.loads(last), **loss})]))
    (ours, plain) = tables(tmp_path)["What depth gains"]  # post has nothing to compare with
    assert ours[:2] == ["norm_placement=pre", "depth=moda"] and plain[1] == "depth=null"
    assert (ours[2], plain[2]) == ("0.001", "0.002")
    assert ours[3].startswith("2.4500 ± ") and plain[3].startswith("2.9500 ± ")
    assert ours[4] == "-0.5000 ± 0.0000 (n = 2)" and ours[5] == "1.00 ± 0.00"


@needs_plotly
def test_runs_in_every_state_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "whole", falling(4, 0.05), evals={20: 3.0})
    cut = write_run(tmp_path / "cut", falling(4, 0.05, 12), evals={10: 3.0}) / "metrics.jsonl"
    cut.write_text(cut.read_text()[:-30])
    failed = write_run(tmp_path / "failed", falling(4, 0.05, 5))
    log = "2026-01-01 00:00:00,000 ERROR moda: Traceback (most recent call last):\n  File x\nRuntimeError: no more memory\n"
    (failed / "train.log").write_text(f"2026-01-01 00:00:00,000 INFO moda: step 5\n{log}")
    (write_run(tmp_path / "empty", []) / "metrics.jsonl").unlink()
    (write_run(tmp_path / "killed at the end", falling(4, 0.05), evals={20: 3.0}) / "summary.json").unlink()
    write_run(tmp_path / "diverged", [*falling(4, 0.05, 9), *[None] * 11])
    edited = write_run(tmp_path / "edited", falling(4, 0.05))
    (edited / "config.yaml").write_text("a: [1")
    (edited / "plan.json").write_text("[]")
    line = '{"step": 3, "loss": "low", "lr": [1], "grad_norm": 1e999, "memory_gib": 1' + "0" * 400 + "}\n"
    (edited / "metrics.jsonl").write_text(line + '{"step": 2, "loss": 2}\n\n')
    write_report([tmp_path], tmp_path)
    states = {name: row["state"] for name, row in rows(tmp_path).items()}
    assert states == {
        "whole": "finished",
        "cut": "unfinished at step 11 of 20; 1 damaged line in metrics.jsonl",
        "failed": "failed: RuntimeError: no more memory at step 5 of 20; no evaluations",
        "empty": "empty",
        "killed at the end": "unfinished at step 20 of 20",
        "diverged": "finished; loss not finite since step 10; no evaluations",
        "edited": "finished; loss not finite since step 3; config.yaml cannot be read; "
        "no plan.json: parameters and FLOPs unknown; no evaluations; 1 damaged line in metrics.jsonl",
    }
    assert all(state in (tmp_path / "report.md").read_text() for state in states.values())


def test_what_cannot_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing" / "step3").mkdir(parents=True)
    run = write_run(tmp_path / "run", [1.0])
    for folders, baseline, text in (
        (["nothing"], None, "folder: expected a run"),
        (["run", "absent"], None, "folder: expected an existing folder"),
        (["run"], "runn", "did you mean 'run'"),
    ):
        with pytest.raises(UserError, match=text):
            write_report([tmp_path / name for name in folders], tmp_path / "out", baseline)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"plotly: .*\.\[report\]"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on runs whose names are markup, templates and formulas."""
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("named")
    for i, name in enumerate(["<img src=x onerror=alert(1)>", "a|b *c* $x_ &%{y}", "_<script>"]):
        write_run(folder / name, falling(4, 0.05 + i / 100), model={"n_layers": i + 1}, evals={10: 4.0, 20: 3.0})
    write_report([folder], folder)
    return folder


def test_names_are_text_not_markup(named: Path) -> None:
    page, text = (named / "report.html").read_text(), (named / "report.md").read_text()
    assert "<img" not in page and page.count("<script") == 3 and "<img" not in text and "<script" not in text
    assert r"| a\|b \*c\* $x_ &amp;%{y} " in text
    assert markdown_table(["x", "y"], [["a|b", "c\nd"]]).splitlines()[2] == r"| a\|b | c d |"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_draws_the_page(named: Path, tmp_path: Path) -> None:
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    line += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", f"file://{named}/report.html"]
    page = subprocess.run(line, capture_output=True, text=True, timeout=120).stdout
    charts = len(chart_data_of(named)["charts"])
    assert charts == 6 and f'data-drawn="{charts}"' in page
    drawn = page.split('id="charts"')[1].split("<noscript")[0]
    assert drawn.count('class="scatterlayer') == charts and drawn.count('class="js-line"') == 2 * 3 * charts
    assert drawn.count(">training FLOPs<") == charts - 1  # a button each, but for the chart over layers
    assert (
        drawn.count(">a|b *c* $x_ &amp;%{y}</text>")
        == drawn.count("&lt;img src=x onerror=alert(1)&gt;</text>")
        == charts
    )


def chart_data_of(folder: Path) -> dict[str, Any]:
    """The data of a page's charts."""
    return json.loads((folder / "report.html").read_text().split('id="data">')[1].split("</script>")[0])


@needs_plotly
def test_the_page_holds_the_curves_and_plotly(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=5000)
    write_run(tmp_path / "plain", list(3 + noise), train={"max_steps": 5000}, evals={2500: 4.0, 5000: 3.0})
    write_run(tmp_path / "moda", list(2 + noise), train={"max_steps": 5000}, model={"depth": MODA}, speed=16)
    write_report([tmp_path], tmp_path)
    data = chart_data_of(tmp_path)
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert list(charts) == [
        "Training loss, smoothed over 5 % of the steps", "Validation loss: c4", "Gradient norm", "Learning rate", "Speed",
        "norm by layer, at the end",
    ]  # fmt: skip
    plain, moda = charts["Training loss, smoothed over 5 % of the steps"]["lines"]
    assert (plain["group"], moda["group"]) == ("plain", "moda") and len(plain["y"]) == 400
    assert plain["y"][-1] == pytest.approx(3 + np.convolve(noise, np.ones(250) / 250, "valid")[-12:].mean(), abs=2e-3)
    ends = [[x[-1] for x in data["xs"][line["x"]]] for line in (plain, moda)]
    assert ends[0] == pytest.approx([160_000, 1.6e7, 2500 / 3600], rel=1e-4)
    assert ends[1] == pytest.approx([160_000, 1.6e7, 10_000 / 3600], rel=1e-4)
    assert data["xs"][charts["Validation loss: c4"]["lines"][0]["x"]][0] == [80_000, 160_000]
    assert charts["norm by layer, at the end"]["lines"][0]["y"] == pytest.approx(
        [1, np.arange(4751, 5001).mean()], rel=1e-4
    )
    packed = (tmp_path / "report.html").read_text().split('id="plotly">')[1].split("<")[0]
    assert b"Plotly" in gzip.decompress(base64.b64decode(packed))
    assert (tmp_path / "report.html").stat().st_size < 2.5e6


def test_paper_rows_are_those_of_the_configurations() -> None:
    files = [ROOT / "configs" / f"{name}.yaml" for name in ("olmo2_700m_36l", "olmo2_700m", "moda_700m_depth_kv")]
    files += [ROOT / "configs" / f"{name}.yaml" for name in ("moda_700m", "moda_700m_projected")]
    files += sorted((ROOT / "configs" / "table6").glob("*.yaml"))
    found = {}
    for file in files:
        config = load_config(file)
        settings = dict(_flatten(to_dict(config)))
        for table in PAPER_TABLES:
            row = table.row(settings)
            if row is not None:
                found[row] = file.stem
                count = transformer_config(config.model, 50_304).num_counted_params / 1e6
                assert count == pytest.approx(table.rows[row][0], abs=0.12), file  # FFN KV of Table 6: 0.1 M more there
    assert set(found) == {row for table in PAPER_TABLES for row in table.rows}
    assert found[("24 layers, post-norm, depth KV", (24, "post", "moda", "reuse", False))] == "24l_post_depth_kv"


def test_the_table_of_the_paper(tmp_path: Path) -> None:
    shape = dict(d_model=384, n_heads=6, n_kv_heads=2, ffn_hidden_size=1536, n_layers=24)
    write_run(tmp_path / "mine", [3.0] * 20, model=shape | {"depth": MODA}, evals={20: 3.5})
    (row,) = (r for r in tables(tmp_path)["The paper's Table 6 (layers and norm placement)"] if r[-1] == "mine")
    name = "24 layers, post-norm, depth KV, FFN KV"
    assert row == [name, "73.72", "1.50", "81.24", "–", "3.4338", "3.5000 (on c4)", "mine"]


def test_the_report_imports_no_torch() -> None:
    code = (
        "import sys, moda.report, moda_cli.report; moda_cli.report.parser();"
        "assert not {'torch', 'olmo_core', 'matplotlib', 'moda.train', 'moda.config'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_runs_validated_at_their_end_alone_are_ranked(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for name, last in {"a": 2.0, "b": 1.5, "c": 3.0}.items():
        for seed in (0, 1):
            write_run(
                tmp_path / f"{name}{seed}", falling(4.0, 0.1), evals={20: last + 0.1 * seed},
                optim={"lr": ord(name) * 1e-5}, train={"seed": seed},
            )  # fmt: skip
    ax = Figure().subplots()
    _draw_ranking(ax, variants(find_runs([tmp_path])), "eval/c4/loss")
    assert [text.get_text() for text in ax.texts] == ["3.050", "2.050", "1.550"], (
        "the least comes last, which is on top"
    )
    seeds = [line for line in ax.lines if line.get_marker() == "."]
    assert [sorted(np.asarray(line.get_xdata()).tolist()) for line in seeds] == [[3.0, 3.1], [2.0, 2.1], [1.5, 1.6]]
