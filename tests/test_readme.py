"""Every command of the README and of docs/ names things that exist; training commands are checked as far as a dry run goes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moda.config import load_config
from moda.train.plan import make_plan
from tests.tiny import ROOT, make_tokenizer

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> Iterator[tuple[str, list[str]]]:
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield f"{document.name}: {' '.join(words)}", words


ALL = list(commands())
TRAINING = [(name, words) for name, words in ALL if "scripts/train.py" in words]
SCRIPTS = sorted({w for _, words in ALL for w in words if re.fullmatch(r"scripts/\w+\.py", w)})


@pytest.mark.parametrize("words", [w for _, w in TRAINING], ids=[n for n, _ in TRAINING])
def test_training_commands(words: list[str], tmp_path: Path) -> None:
    arguments = words[words.index("scripts/train.py") + 1 :]
    config, overrides = arguments[0], [a for a in arguments[1:] if not a.startswith("--")]
    if not (ROOT / config).is_file():
        pytest.skip(f"{config} is the reader's own file")
    tokenizer = make_tokenizer(tmp_path / "my_tokenizer" / "tokenizer.json")
    overrides = [o.replace("my_tokenizer/tokenizer.json", str(tokenizer)) for o in overrides]
    processes = next((int(w.split("=")[1]) for w in words if w.startswith("--nproc-per-node=")), 1)
    make_plan(load_config(ROOT / config, overrides), processes)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves(script: str) -> None:
    assert (ROOT / script).is_file()
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "usage" in shown.stdout.lower(), shown.stderr


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for _, words in ALL:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile


def test_pictures_and_links_exist() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), (document.name, target)
