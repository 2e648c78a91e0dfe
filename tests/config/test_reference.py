"""The reference of all keys is made from the schema, and the page is what it makes."""

from __future__ import annotations

import pytest

import moda_cli
from moda.config.reference import page
from tests.tiny import ROOT


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run: make docs"


def test_every_key_has_a_type_a_default_and_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        moda_cli.main(["train", "--help-config"])
    blocks = capsys.readouterr().out.split("\n")
    assert stopped.value.code == 0 and len(blocks) > 200 and len(blocks) % 3 == 1
    for path, kind, about in zip(blocks[0::3], blocks[1::3], blocks[2::3]):
        assert path[:1].isalpha() and "default" in kind and len(about.strip()) > 5, path


BETAS = "optim.betas\n    a list of numbers from 0 to below 1; default: [0.9, 0.95]\n"
RECENT = "model.depth (mechanism: moda).read.recent.n\n    an integer >= 1; no default"


@pytest.mark.parametrize(
    "words, expected",
    [
        ("train --help-config optim.betas", BETAS),
        ("plan x.yaml --help-config train.max_steps", "an integer >= 1 or null (steps); default: null\n"),
        ("train --help-config model.depth.read", RECENT),
        ("prepare tokenize --help-config shard_tokens", "an integer >= 1 (tokens); default: 134217728"),
    ],
)
def test_one_key(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        moda_cli.main(words.split())
    assert stopped.value.code == 0 and expected in capsys.readouterr().out


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert moda_cli.main(["train", "--help-config", "optim.lrr"]) == 2
    assert capsys.readouterr().err.endswith("(did you mean 'optim.lr'?)\n")  # not a page of keys beside it
