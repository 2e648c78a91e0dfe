"""What a model attends to: weights that are known in advance, and the page."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from moda.errors import UserError
from moda.generate import load_decoder
from moda.visualize import look
from moda_cli import main
from tests.small_checkpoint import MODEL, run_config, save_checkpoint
from tests.tiny import make_tokenizer

T, LAYERS = 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ``moda`` and ``plain``, whose queries are all zero: attention is uniform over what a query sees."""
    root = tmp_path_factory.mktemp("visualize")
    tokenizer = make_tokenizer(root / "tokenizer.json")
    for name, model in (("moda", MODEL), ("plain", {**MODEL, "depth": None})):
        save_checkpoint(root / name, run_config(tokenizer, model))
    return root


def uniform(folder: Path) -> object:
    decoder, _, _ = load_decoder(folder, torch.device("cpu"))
    for layer in decoder.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return decoder


def test_weights_known_in_advance(folder: Path) -> None:
    seen = look(uniform(folder / "moda"), list(range(T)), list("abcdef"), "moda")
    for layer in range(LAYERS):
        slots = 2 * layer
        sees = torch.arange(1, T + 1).float() + slots
        torch.testing.assert_close(seen.depth_mass()[layer], (slots / sees).mean().expand(2))
        torch.testing.assert_close(seen.sink_mass()[layer], (1 / sees)[1:].mean().expand(2))
        assert seen.slot_mass()[layer] == pytest.approx(dict.fromkeys(seen.sources[layer], (1 / sees).mean().item()))
    assert seen.sources[1:] == [
        ["layer 0 attention", "layer 0 FFN"],
        ["layer 0 attention", "layer 0 FFN", "layer 1 attention", "layer 1 FFN"],
    ]
    plain = look(uniform(folder / "plain"), list(range(T)), list("abcdef"), "plain")
    assert plain.depth_mass().abs().max() == 0 and plain.sources == [[]] * LAYERS


def test_lens_and_cosine_end_at_the_model_itself(folder: Path) -> None:
    decoder, _, _ = load_decoder(folder / "moda", torch.device("cpu"))
    ids = torch.arange(T)[None]
    seen = look(decoder, ids[0].tolist(), list("abcdef"), "moda")
    with torch.no_grad():
        logits = decoder(ids).logits[0]
    loss, agreement = seen.lens[-1]
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item(), rel=1e-5)
    assert agreement == 1.0 and len(seen.lens) == LAYERS + 1
    cosine = seen.cosine()
    assert cosine is not None
    torch.testing.assert_close(cosine.diagonal(), torch.ones(LAYERS + 1))
    embedded = decoder.model.embed_tokens(ids)[0]
    last = seen.streams[-1] if seen.streams is not None else embedded
    torch.testing.assert_close(cosine[0, -1], torch.cosine_similarity(embedded, last, dim=-1).mean())


def test_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    line = ["visualize", str(folder / "moda"), str(folder / "plain"), "--text", "<b>&text", "--out", str(out)]
    assert main([*line, "--layers", "1,2", "--heads", "1"]) == 0
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == 6
    assert "&lt;b&gt;&amp;text" in page and "<b>" not in page
    rows = list(csv.DictReader((out / "heads.csv").open()))
    assert len(rows) == 2 * LAYERS * 2 and {r["model"].split("/")[-1] for r in rows} == {"moda", "plain"}
    assert float(rows[-1]["depth_mass"]) == 0 < float(rows[5]["depth_mass"]) < 1
    assert main([*line, "--tokens", "1"]) == 2
    assert "error: --text: expected at least two tokens, got 1" in capsys.readouterr().err
    for option, number in (("--layers", "99"), ("--heads", "1,99")):
        assert main([*line, option, number]) == 2
        assert f"error: {option}: expected numbers below" in capsys.readouterr().err
    (tmp_path / "taken").touch()
    assert main([*line, "--out", str(tmp_path / "taken")]) == 2
    assert "--out: expected a place that can be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*line, "--layers", "a"])


def test_a_text_of_one_token_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="at least two tokens"):
        look(uniform(folder / "moda"), [1], ["a"], "moda")
