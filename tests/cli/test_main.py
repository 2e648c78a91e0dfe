"""``moda COMMAND``: names, help, errors and exit codes."""

import errno
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import moda_cli
from moda import __version__
from moda.errors import UserError
from moda.train.environment import launched_world_size
from moda_cli import train
from moda_cli._main import COMMANDS, arguments
from tests.tiny import ROOT, command, environment, write_config

SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("*.py"))


def moda(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "moda_cli", *words]
    return subprocess.run(
        line, env={**environment(), **variables}, capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def test_every_command_has_a_module_and_every_module_is_a_command() -> None:
    modules = {p.stem for p in (ROOT / "scripts" / "moda_cli").glob("[!_]*.py")}
    assert modules == set(COMMANDS)


def test_help_lists_the_commands_and_comes_at_once() -> None:
    moda("--help")  # compiles and caches
    begun = time.monotonic()
    shown = moda("--help")
    seconds = time.monotonic() - begun
    assert shown.returncode == 0 and seconds < 5  # importing torch alone takes longer on a busy machine
    assert all(f"    {name} " in shown.stdout for name in COMMANDS)
    assert moda("--version").stdout == f"moda {__version__}\n"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, moda_cli._main as m; m._all_commands(False).format_help();"
        "assert not {'torch', 'olmo_core', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        moda_cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and shown.startswith(f"usage: moda {name} ") and "%(" not in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script(script: str) -> None:
    line = [sys.executable, f"scripts/{script}", "--help"]
    shown = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr
    assert script in shown.stdout


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert moda_cli.main([]) == 2
    assert "usage: moda" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert moda_cli.main(["trian", "x.yaml"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["eval", "--taks", "copa"],
        ["generate"],
        ["prepare", "mirror", "mix"],
        ["prepare"],
    ],
    ids=" ".join,
)
def test_arguments_that_are_not_accepted(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        moda_cli.main(words)
    assert stopped.value.code == 2 and f"moda {words[0]}" in capsys.readouterr().err


def test_overrides_may_stand_among_options() -> None:
    args = arguments("train", ["a.yaml", "optim.lr=1", "--dry-run", "train.seed=2"])
    assert (args.config, args.overrides, args.dry_run) == ("a.yaml", ["optim.lr=1", "train.seed=2"], True)
    args = arguments("eval", ["a", "b", "--tasks", "copa", "sciq", "--limit", "5"])
    assert args.checkpoint == ["a", "b"] and args.tasks == ["copa", "sciq"] and args.limit == 5


def test_drawing_what_layers_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "reads.svg"
    demo = ["--config", str(ROOT / "configs" / "moda_demo.yaml"), "model.n_layers=3"]
    assert moda_cli.main(["draw", str(picture), *demo, "--reads", "all", "{recent: 2}"]) == 0
    drawn = picture.read_text()
    assert "all slots of earlier layers" in drawn and "the 2 most recent slots" in drawn
    plain = ["--config", str(ROOT / "configs" / "olmo2_demo.yaml")]
    for wrong, words in ((["--reads", "all"], "--config FILE beside it"), (plain, "a configuration with model.depth")):
        assert moda_cli.main(["draw", str(picture), *wrong]) == 2
        assert words in capsys.readouterr().err


def test_plan_is_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path))
    assert moda_cli.main(["plan", config, "optim.lr=0.5"]) == 0
    planned = capsys.readouterr().out
    assert moda_cli.main(["train", "--dry-run", config, "optim.lr=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.5" in planned and set(shown.splitlines()) < set(planned.splitlines())
    assert "proposed" in planned and "GPU-hours" in planned and "proposed" not in shown
    options = ["--gpus", "4", "--memory", "24", "--mfu", "0.5", "--peak", "100"]
    assert moda_cli.main(["plan", config, "train.microbatch_size=1", *options]) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "processes 4" in planned and "24.0 GiB of an assumed GPU" in planned and "MFU 50% of 100 TFLOP/s" in planned
    assert not (tmp_path / "run").exists()


def raising(error: BaseException):  # type: ignore[no-untyped-def]
    def run(args: object) -> int:
        raise error

    return run


def test_an_interruption_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(KeyboardInterrupt()))
    assert moda_cli.main(["train", "x.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted: the same command resumes from the newest checkpoint\n"


def test_a_bug_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(RuntimeError("no such shape\nand more")))
    monkeypatch.delenv("MODA_TRACEBACK", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert moda_cli.main(["train", "x.yaml"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: this is a bug: RuntimeError: no such shape (traceback: ") and line.count("\n") == 1
    (file,) = tmp_path.glob("moda-*.log")
    assert str(file) in line and "Traceback" in file.read_text() and "and more" in file.read_text()

    log = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(log)
    try:
        assert moda_cli.main(["train", "x.yaml"]) == 1
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    assert str(tmp_path / "train.log") in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "train.log").read_text()

    monkeypatch.setenv("MODA_TRACEBACK", "1")
    monkeypatch.setenv("RANK", "3")
    assert moda_cli.main(["train", "x.yaml"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "error: this is a bug on rank 3: RuntimeError" in shown


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            torch.OutOfMemoryError("tried to allocate 8 GiB"),
            "error: out of GPU memory: OutOfMemoryError: tried to alloc",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), "error: x is not installed in this Python ("),
        (ModuleNotFoundError("No module named 'regex'", name="regex"), "pip install -e '.[data]'"),
    ],
    ids=["memory", "package", "extra"],
)
def test_what_is_no_bug(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(error))
    monkeypatch.setenv("MODA_TRACEBACK", "1")
    assert moda_cli.main(["train", "x.yaml"]) == 1
    assert expected in capsys.readouterr().err


def test_a_python_without_the_project_says_what_to_activate() -> None:
    line = [sys.executable, "-S", str(ROOT / "scripts" / "train.py"), "x.yaml"]  # -S: without site-packages
    alone = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(line, env=alone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: moda is not installed") and ".venv/bin/activate" in done.stderr


def test_a_closed_pipe_is_no_bug(tmp_path: Path) -> None:
    line = f"{sys.executable} -m moda_cli plan {write_config(tmp_path)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1, 141)  # 1 is rich's
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_bad_input_survives_pickling() -> None:
    error = UserError("train.seed", "a number >= 0", -1, "choose another")
    copy = pickle.loads(pickle.dumps(error))
    assert (
        type(copy) is UserError
        and str(copy) == str(error) == "train.seed: expected a number >= 0, got -1 (choose another)"
    )
    assert (copy.key, copy.expected, copy.got, copy.hint) == ("train.seed", "a number >= 0", -1, "choose another")
    assert str(UserError("a", "b", "c")) == "a: expected b, got c" and str(UserError("a", "b")) == "a: expected b"


def test_of_several_processes_one_reports_bad_input(tmp_path: Path) -> None:
    """The text has no file; rank 0 finds out and sends its error to rank 1."""
    config = write_config(tmp_path, data=dict(text=[str(tmp_path / "absent")]))
    done = subprocess.run(command(config, processes=2), env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1  # torchrun's own
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "data.text" in done.stderr and "exitcode  : 2" in done.stderr
    assert "Error: " not in done.stderr.replace("ChildFailedError: ", "")


def test_variables_are_set_before_torch_is_imported() -> None:
    code = """
import os, sys
import moda_cli
from moda_cli import train
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("THP_MEM_ALLOC_ENABLE"), os.environ.get("OMP_WAIT_POLICY"))
            sys.exit(7)
sys.meta_path.insert(0, Watch())
moda_cli.main(["train", "configs/moda_demo.yaml"])
"""
    clean = {k: v for k, v in environment().items() if k not in ("THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 7 and done.stdout == "1 PASSIVE\n", done.stderr


def test_completion_without_its_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stopped:
        moda_cli.main(["--print-completion=bash"])
    assert stopped.value.code == 2 and "shtab: pip install -e '.[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stopped:
        moda_cli.main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert stopped.value.code == 0 and "tokenize" in script and "--temperature" in script
    if shell == "bash":
        words = "moda prepare inspect --pl"
        line = f"{script}\nCOMP_WORDS=({words}); COMP_CWORD=3; _shtab_moda; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
        assert done.stdout == "--plot\n", done.stderr


@pytest.mark.parametrize(
    "words, key",
    [
        (["compare", "nowhere", "nowhere", "--plot", "/proc/x.png"], "--plot"),
        (["compare", "nowhere", "nowhere", "--plot", "x.docx"], "--plot"),
        (["compare", "nowhere", "nowhere", "--output", "/proc/x/y.md"], "--output"),
        (["compare", "nowhere", "nowhere", "--output", "."], "--output"),
        (["prepare", "inspect", "nowhere", "--plot", "/proc/x.svg"], "--plot"),
        (["draw", "/proc/x.png", "--config", "nowhere.yaml"], "output"),
        (["bench", "data", "--out", "/proc/x.csv", "--text", "nowhere"], "--out"),
        (["bench", "eval", "nowhere.yaml", "--output", "/proc/x.csv"], "--output"),
    ],
    ids=" ".join,
)
def test_where_it_goes_is_checked_first(words: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What it is made from does not exist either: that would be found later."""
    assert moda_cli.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {key}: expected a ")


FULL = OSError(errno.ENOSPC, "No space left on device", "run/step4/x.distcp")


def within(inner: BaseException) -> RuntimeError:
    error = RuntimeError("writing failed")
    error.__cause__ = inner
    return error


@pytest.mark.parametrize("error", [FULL, within(FULL), CheckpointException("write", {0: (FULL, None)})])  # type: ignore[dict-item]
def test_a_full_disk_is_no_bug(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", raising(error))
    monkeypatch.delenv("MODA_TRACEBACK", raising=False)
    assert moda_cli.main(["train", "x.yaml"]) == 2
    expected = "run/step4/x.distcp: expected a file, folder or disk that can be used, got No space left on device"
    assert capsys.readouterr().err == f"error: {expected}\n"


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", ">= 1", "two"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE", ">= 1", "0"]),
        ({"RANK": "-1"}, ["RANK", ">= 0", "-1"]),
        ({"LOCAL_RANK": "x", "RANK": "0"}, ["LOCAL_RANK", "x"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK", "less than WORLD_SIZE (2)"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR", "torchrun sets it"]),
    ],
)
def test_variables_of_the_launcher(
    variables: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched_world_size() == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        launched_world_size()
    assert all(word in str(caught.value) for word in words), caught.value
