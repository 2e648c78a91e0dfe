"""Every command of the README, of docs/ and of CONTRIBUTING.md is accepted by its own parser; training commands are planned."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from moda.config import load_config
from moda.train.plan import make_plan
from moda_cli._main import COMMANDS, arguments
from tests.tiny import PROCESSES, ROOT, make_tokenizer

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Programs that are not ours.
OTHERS = {"docker", "eval", "export", "git", "lm_eval", "mypy", "pre-commit", "pytest", "ruff", "sbatch", "source"}


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for block in re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE):
            yield document, block


def lines() -> Iterator[tuple[Path, str]]:
    """Command lines: those of bash blocks, and whole ones in the text."""
    for document, block in blocks("bash"):
        yield from ((document, line) for line in block.replace("\\\n", " ").splitlines())
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        for line in re.findall(r"`((?:python|torchrun|moda|make|pip) [^`]+)`", text):
            if not re.fullmatch(r"moda [a-z]+", line):  # the name of a command
                yield document, line


def words_of(line: str) -> list[str]:
    """What the shell would pass on; options that are shown as optional (``[--limit N]``) are taken as given."""
    words = shlex.split(" ".join(line.split()), comments=True)
    optional = False
    for i, word in enumerate(words):
        if word.startswith("[--"):
            words[i], optional = word[1:], True
        if optional and words[i].endswith("]"):
            words[i], optional = words[i][:-1], False
    return ["1" if word == "N" else word for word in words]


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """The command of this project in a line, and its arguments."""
    if words[0] == "moda":
        return words[1], words[2:]
    if "moda_cli" in words:
        at = words.index("moda_cli") + 1
        return words[at], words[at + 1 :]
    script = next((i for i, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)), None)
    if script is None:
        return None
    called = re.search(r'script\("(\w+)"(?:, "(\w+)")?\)', (ROOT / words[script]).read_text())
    assert called is not None, f"{words[script]} calls no command"
    rest = words[script + 1 :]
    return (rest[0], rest[1:]) if rest and rest[0] == called[2] else (called[1], rest)


ALL = [(f"{d.name}: {' '.join(w)}", w) for d, line in lines() if (w := words_of(line))]
COMMAND_LINES = [(name, words, called) for name, words in ALL if (called := ours(words)) is not None]
PYTHON = [(f"{d.name}: {text.strip().splitlines()[0]}", text) for d, text in blocks("python")]


def test_there_is_something_to_check() -> None:
    assert len(COMMAND_LINES) > 20 and {"train", "eval", "prepare", "export"} <= {c for _, _, (c, _) in COMMAND_LINES}
    assert any(document.name == "README.md" for document, _ in blocks("python"))


@pytest.mark.parametrize("words, called", [c[1:] for c in COMMAND_LINES], ids=[c[0] for c in COMMAND_LINES])
def test_commands(words: list[str], called: tuple[str, list[str]], tmp_path: Path) -> None:
    command, given = called
    if command.startswith("--") or command == "COMMAND" or "--help" in given:
        return
    assert command in COMMANDS
    args = arguments(command, given)  # exits where the parser refuses
    if command in ("train", "plan") and (ROOT / args.config).is_file():  # others are the reader's own
        tokenizer = make_tokenizer(tmp_path / "my_tokenizer" / "tokenizer.json")
        overrides = [o.replace("my_tokenizer/tokenizer.json", str(tokenizer)) for o in args.overrides]
        processes = next((int(w.split("=")[1]) for w in words if w.startswith("--nproc-per-node=")), 1)
        make_plan(load_config(ROOT / args.config, overrides), processes)
    if command == "prepare" and given[0] == "tokenize" and "=" in args.arguments[0]:
        from moda.data.prepare import load_options

        load_options(None, args.arguments)


def test_a_wrong_option_would_be_found() -> None:
    for line in (
        "python scripts/eval.py CHECKPOINT --sweet all",
        "moda export CHECKPOINT",
        "moda prepare mirror MIX",
    ):
        called = ours(words_of(line))
        assert called is not None
        with pytest.raises(SystemExit):
            arguments(*called)


def test_names_of_commands() -> None:
    names = {name for document in DOCUMENTS for name in re.findall(r"`moda ([a-z]+)`", document.read_text())}
    assert names and names <= set(COMMANDS)


@pytest.mark.parametrize("words", [w for _, w in ALL if ours(w) is None], ids=" ".join)
def test_other_programs(words: list[str]) -> None:
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "pip" or words[:3] == ["python", "-m", "pip"]:
        for extra in re.findall(r"\.\[([\w-]+)\]", " ".join(words)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    elif words[0].startswith("."):
        assert words[0].startswith(".venv/") or (ROOT / words[0]).is_file()
    else:
        assert words[0] in OTHERS, "a program that no test knows"


def execute(text: str, folder: Path, printed: Path) -> None:
    """Run a block of Python in a folder, as a script of one's own that stands there."""
    for shared in ("configs", "docs", "README.md"):
        (folder / shared).symlink_to(ROOT / shared)
    os.chdir(folder)
    torch.set_num_threads(1)
    with printed.open("w") as f, contextlib.redirect_stdout(f):
        exec(compile(text, "block.py", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", [t for _, t in PYTHON], ids=[n for n, _ in PYTHON])
def test_python_runs(text: str, tmp_path: Path) -> None:
    if "cuda" in text and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    (tmp_path / "clone").mkdir()
    process = PROCESSES.Process(target=execute, args=(text, tmp_path / "clone", tmp_path / "printed"))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    if "train(" in text:  # docs/python.md: layer 3 of the demo reads six slots
        shown = (tmp_path / "printed").read_text()
        assert "4 steps" in shown and "layer 0: 0 slots, 0% of the attention" in shown and "layer 3: 6 slots" in shown


MODELS = [text for document, text in blocks("yaml") if document.name == "README.md"]


@pytest.mark.parametrize("text", MODELS, ids=[m.splitlines()[0] for m in MODELS])
def test_model_sections_are_accepted(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"base": str(ROOT / "configs" / "moda_demo.yaml"), **yaml.safe_load(text)}))
    load_config(file)


def test_pictures_and_links_exist() -> None:
    for document in DOCUMENTS:
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert target.startswith("http") or (document.parent / target).exists(), (document.name, target)
