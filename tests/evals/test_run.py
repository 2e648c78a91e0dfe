"""The command line: results, resuming, several checkpoints and ranks, comparison, bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moda.checkpoints import load_model, open_checkpoint, read_weights
from moda.errors import UserError
from moda_evals import run as evals_run
from moda_evals.compare import compare
from moda_evals.model import load
from moda_evals.paper import paper_rows
from tests.small_checkpoint import run_config, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> int:
    """``scripts/eval.py`` in this process."""
    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "scripts" / "eval.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(list(arguments))


@pytest.fixture
def text(tmp_path: Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(
            f"Document {i} has a few words and then naïve ones. " * (i + 1), encoding="utf-8"
        )
    return str(folder)


def test_two_checkpoints_side_by_side_and_their_comparison(
    checkpoint: Path, tokenizer_file: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "step10"
    save_checkpoint(other, run_config(tokenizer_file), seed=1)
    out = tmp_path / "out"
    arguments = ["--tasks", "copa", "sciq", "--limit", "20", "--text", f"mine={text}", "--window", "64"]
    assert command(str(checkpoint), str(other), *arguments, "--output", str(out), "--per-example", "--paper") == 0
    output = capsys.readouterr().out
    assert "COPA" in output and "MoDA-700M (paper)" in output and "window 64, stride 32" in output
    labels = [f"{p.parent.name}-step10" for p in (checkpoint, other)]
    results = [json.loads((out / label / "results.json").read_text()) for label in labels]
    assert results[0]["versions"]["torch"] == torch.__version__ and results[0]["settings"]["limit"] == 20
    copa = results[0]["downstream"]["copa"]
    assert copa["n"] == 20 and copa["accuracy"] == copa["correct"].count("1") / 20 and "examples" not in copa
    assert len((out / labels[0] / "examples" / "copa.jsonl").read_text().splitlines()) == 20
    assert results[0]["averages"] == {"accuracy": None, "perplexity": None}
    for name in ("results.md", "results.csv"):
        assert all(label in (out / name).read_text() for label in labels)

    plot = tmp_path / "plot.png"
    folders = [str(out / label) for label in labels]
    assert command("compare", *folders, "--paper", "--plot", str(plot), "--output", str(tmp_path / "c.md")) == 0
    assert plot.stat().st_size > 5000 and "COPA" in (tmp_path / "c.md").read_text()
    differences = {d.name: d for d in compare(*results, draws=4000)}
    for d in differences.values():
        assert d.low is not None and d.high is not None and d.low <= d.difference <= d.high
    pairs = list(zip(results[0]["downstream"]["copa"]["correct"], results[1]["downstream"]["copa"]["correct"]))
    steps = [int(b) - int(a) for a, b in pairs]
    mean = sum(steps) / 20
    error = 100 * (sum((s - mean) ** 2 for s in steps) / 20**2) ** 0.5
    assert differences["copa"].high - differences["copa"].low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_resumes_by_task(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = evals_run.Options(suite="downstream", tasks=("copa", "piqa"), limit=6)
    seen: list = []
    real = evals_run.evaluate_task

    def stop_at_piqa(model, task, **kwargs):
        seen.append(task.name)
        if task.name == "piqa" and len(seen) == 2:
            raise KeyboardInterrupt
        return real(model, task, **kwargs)

    monkeypatch.setattr(evals_run, "evaluate_task", stop_at_piqa)
    with pytest.raises(KeyboardInterrupt):
        evals_run.evaluate(str(checkpoint), options, tmp_path)
    evals_run.evaluate(str(checkpoint), options, tmp_path)
    assert seen == ["copa", "piqa", "piqa"]
    evals_run.evaluate(str(checkpoint), evals_run.Options(suite="downstream", tasks=("copa",), limit=7), tmp_path)
    assert seen[3:] == ["copa"]  # other settings: measured again


def test_a_text_that_has_changed_is_measured_again(checkpoint: Path, text: str, tmp_path: Path) -> None:
    options = evals_run.Options(suite="perplexity", text={"mine": [text]})
    before = evals_run.evaluate(str(checkpoint), options, tmp_path / "out")["perplexity"]["mine"]
    assert evals_run.evaluate(str(checkpoint), options, tmp_path / "out")["perplexity"]["mine"] == before
    (Path(text) / "0.txt").write_text("Another text, and a longer one than the first.")
    after = evals_run.evaluate(str(checkpoint), options, tmp_path / "out")["perplexity"]["mine"]
    assert after["loss"] != before["loss"]


@pytest.mark.parametrize("suite", ["perplexity", "downstream"])
def test_a_model_that_gives_nan_has_no_figures(suite: str, tokenizer_file: Path, text: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "step10"
    save_checkpoint(broken, run_config(tokenizer_file), spoil=lambda weight: weight.fill_(float("nan")))
    text_sets = {"mine": [text]} if suite == "perplexity" else {}
    options = evals_run.Options(suite=suite, tasks=("copa",), limit=4, text=text_sets)
    with pytest.raises(UserError, match="numbers, got nan"):
        evals_run.evaluate(str(broken), options, tmp_path / "out")


def test_two_ranks_give_the_same_figures(checkpoint: Path, text: str, tmp_path: Path) -> None:
    arguments = ["--tasks", "copa", "boolq", "--limit", "12", "--text", f"mine={text}", "--batch-size", "600"]
    assert command(str(checkpoint), *arguments, "--output", str(tmp_path / "one")) == 0
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += [str(ROOT / "scripts" / "eval.py"), str(checkpoint), *arguments, "--output", str(tmp_path / "two")]
    packages = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "evals"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": packages}
    # A locale that is not UTF-8 changes nothing; what a terminal can show is not what is tested here.
    environment.update(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="utf-8")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    label = f"{checkpoint.parent.name}-step10"
    one, two = (json.loads((tmp_path / n / label / "results.json").read_text()) for n in ("one", "two"))
    for suite in ("downstream", "perplexity"):
        for name, entry in one[suite].items():
            other = two[suite][name]
            assert {k: v for k, v in entry.items() if k != "seconds"} == {
                k: v for k, v in other.items() if k != "seconds"
            }
    assert two["processes"] == 2


def test_reads_what_was_saved(checkpoint: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step3"
    model = save_checkpoint(folder, run_config(tokenizer_file), seed=5)
    loaded = load_model(open_checkpoint(folder))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_an_olmo_core_checkpoint(tokenizer_file: Path, tmp_path: Path) -> None:
    from olmo_core.distributed.checkpoint import save_state_dict
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    config = TransformerConfig.llama_like(
        vocab_size=600, n_layers=2, d_model=32, n_heads=2, qk_norm=True, block_name=TransformerBlockType.reordered_norm
    )
    model = config.build(init_device="cpu")
    model.init_weights(device=torch.device("cpu"), max_seq_len=64)
    folder = tmp_path / "step7"
    save_state_dict(str(folder / "model_and_optim"), {f"model.{n}": p.detach() for n, p in model.named_parameters()})
    tokenizer = {"identifier": str(tokenizer_file), "vocab_size": 600, "eos_token_id": 0, "pad_token_id": 0}
    settings = {"model": config.as_config_dict(), "dataset": {"tokenizer": tokenizer, "sequence_length": 64}}
    (folder / "config.json").write_text(json.dumps(settings))
    loaded = load(str(folder))
    assert loaded.kind == "olmo-core" and loaded.context_length == 64
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.logits(ids), model(ids), atol=1e-6)
    settings["model"]["block"]["_CLASS_"] = "os.system"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="classes of OLMo-core"):
        load(str(folder))


class _Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_damaged_and_forged_checkpoints(
    checkpoint: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / name / "step10"))

    shard = next(p for p in copy("a").rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="a whole checkpoint"):
        load(str(tmp_path / "a" / "step10"))
    from moda.checkpoints import write_checksums

    whole = copy("d")
    (whole / "train").mkdir()
    (whole / "train" / "rank0.pt").write_bytes(b"never read")
    (whole / ".metadata.json").write_text("{}")
    write_checksums(whole)
    shard = max(whole.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="have changed since it was saved"):
        load(str(whole))
    table = copy("b") / "model_and_optim" / ".metadata"
    table.write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(UserError, match="table of contents"):
        read_weights(table.parents[1])
    assert not (tmp_path / "harmed").exists()
    folder = copy("c")
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["n_layers"] = 4
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the weights of the model"):
        load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="readable"):
        load(str(folder))
    with pytest.raises(UserError, match="it has step10"):
        load(str(checkpoint.parent))


def test_a_tokenizer_that_does_not_match(checkpoint: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    from moda.data.tokenizer import packaged_tokenizer_file

    with pytest.raises(UserError, match="--tokenizer: expected a tokenizer of at most the 600 tokens"):
        load(str(checkpoint), tokenizer=str(packaged_tokenizer_file()))
    other = json.loads(tokenizer_file.read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="the tokenizer that the model was trained with"):
        load(str(checkpoint), tokenizer=str(tmp_path / "tokenizer.json"))


def test_bad_command_lines(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path)]
    for arguments, message in (
        (["--tasks", "pica"], "did you mean 'piqa'"),
        (["--text", "nonsense"], "NAME=PATH"),
        (["--suite", "perplexity", "--base-dir", str(tmp_path / "none")], "c4_en/val/part-0-00000.npy"),
        (["--suite", "perplexity", "--text", f"x={tmp_path / 'none'}"], "that exist"),
    ):
        assert command(str(checkpoint), *arguments, *out) == 2
        assert message in capsys.readouterr().err
    assert command("compare", str(tmp_path), str(tmp_path)) == 2
    with pytest.raises(SystemExit, match="2"):
        command(str(checkpoint), "--limit", "0", *out)
    assert "--limit: expected an integer >= 1, got 0" in capsys.readouterr().err


def test_the_printed_rows_hang_together() -> None:
    """The paper's averages are the means of its columns, and its accuracies whole numbers of questions of our sets."""
    sizes = dict(
        piqa=1838, hellaswag=10042, winogrande=1267, openbookqa=500, boolq=3270, sciq=1000, arc_easy=570,
        arc_challenge=299, copa=100, mmlu_mc=14042,
    )  # fmt: skip
    for row in paper_rows().values():
        for suite in ("downstream", "perplexity"):
            assert sum(row.figures[suite].values()) / 10 == pytest.approx(row.averages[suite], abs=0.011)
        for task, value in row.figures["downstream"].items():
            n = sizes[task]
            right = round(value / 100 * n)
            assert abs(100 * right / n - value) < 0.0051, (row.name, task)
