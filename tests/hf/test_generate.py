"""Generation with a cache against recomputing everything for every token, by the model that was trained."""

from __future__ import annotations

import importlib.util
import io
import pydoc_data.topics
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import DynamicCache

from moda.checkpoints import choose_checkpoint, load_model, open_checkpoint, write_checksums
from moda.config.schema import TokenizerSection
from moda.data import load_tokenizer
from moda.errors import UserError
from moda.generate import Sampling, generate, load_decoder, stream_text
from moda.hf import write_export
from tests.small_checkpoint import run_config, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(list(pydoc_data.topics.topics.values())[:5], trainer)
    tok.save(str(folder / "tokenizer.json"))
    save_checkpoint(folder / "step10", run_config(folder / "tokenizer.json", sequence_length=48), seed=6)
    return folder / "step10"


def test_greedy_is_what_the_trained_model_prefers(checkpoint: Path, tmp_path: Path) -> None:
    write_export(open_checkpoint(checkpoint), tmp_path / "hf")
    native = load_model(open_checkpoint(checkpoint))
    prompt = [5, 80, 120, 7]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(native(torch.tensor([ids]))[0, -1].argmax()))
    for folder in (checkpoint, tmp_path / "hf"):
        decoder, tokenizer, length = load_decoder(folder, CPU)
        assert tokenizer is not None and length == 48
        found = list(generate(decoder, prompt, max_new_tokens=20, sampling=Sampling(temperature=0)))
        assert found == ids[4:]


def test_the_cache_holds_the_sequence_only(checkpoint: Path) -> None:
    """One key and one value of every layer and token: no depth slot is kept."""
    decoder, _, _ = load_decoder(checkpoint, CPU)
    cache = DynamicCache()
    with torch.no_grad():
        decoder(torch.arange(10)[None], past_key_values=cache, use_cache=True)
        decoder(torch.arange(1)[None], past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[2] for layer in cache.layers] == [11] * 3
    assert not any(isinstance(v, torch.Tensor) for m in decoder.modules() for n, v in vars(m).items() if n[0] != "_")


def test_sampling(checkpoint: Path) -> None:
    decoder, _, _ = load_decoder(checkpoint, CPU)
    draws = [list(generate(decoder, [3], max_new_tokens=15, sampling=Sampling(1.0, seed=s))) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    with torch.no_grad():
        p, order = decoder(torch.tensor([[3]])).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = int((p.cumsum(0) < 0.5).sum()) + 1  # the fewest tokens that together have half the probability
    for sampling, allowed in ((dict(top_k=3), 3), (dict(top_p=0.5), nucleus)):
        drawn = {
            t
            for s in range(120)
            for t in generate(decoder, [3], max_new_tokens=1, sampling=Sampling(1.0, seed=s, **sampling))
        }
        assert drawn <= set(order[:allowed].tolist()) and (allowed == 1 or len(drawn) > 1)
    with pytest.raises(UserError, match="--top-p"):
        Sampling(top_p=0)


def test_stops_at_the_end_of_the_context_and_at_stop_tokens(checkpoint: Path) -> None:
    decoder, _, length = load_decoder(checkpoint, CPU)
    greedy = Sampling(temperature=0)
    assert len(list(generate(decoder, [3] * 40, max_new_tokens=99, sampling=greedy, context_length=length))) == 8
    found = list(generate(decoder, [3], max_new_tokens=9, sampling=greedy))
    stopped = list(generate(decoder, [3], max_new_tokens=9, sampling=greedy, stop=found[4:5]))
    assert stopped == found[: found.index(found[4])]
    with pytest.raises(UserError, match="fewer tokens than the model's context of 48"):
        list(generate(decoder, [3] * 48, max_new_tokens=1, context_length=length))


def test_text_comes_in_whole_characters(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection(str(checkpoint.parent / "tokenizer.json")))
    text = "a Käse costs 3 €, 日本"
    ids = tokenizer.load().encode(text, add_special_tokens=False).ids
    pieces = list(stream_text(ids, tokenizer))
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces) and len(pieces) > 5


def test_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "scripts" / "generate.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(checkpoint), "The import", "--max-new-tokens", "5", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("The import")
    assert script.main([str(checkpoint), "", "--max-new-tokens", "5"]) == 2
    assert "at least one token" in capsys.readouterr().err
    assert script.main([str(checkpoint), "The import", "--max-new-tokens", "400", "--temperature", "0"]) == 0
    assert "stopped before 400: the context of 48 tokens is full" in capsys.readouterr().err
    options = ["--max-new-tokens", "5", "--seed", "1", "--samples", "2"]
    assert script.main([str(checkpoint), "The import", *options]) == 0
    one, two = capsys.readouterr().out.split("--- 2 of 2\n")
    assert one == f"--- 1 of 2\n{first}" and two.startswith("The import") and two != first
    assert script.main([str(checkpoint), "The import", "--max-new-tokens", "20", "--samples", "3"]) == 0
    assert len(set(re.split("--- . of 3\n", capsys.readouterr().out)[1:])) == 3  # without a seed too
    for wrong in ([], ["a", "--interactive"]):
        assert script.main([str(checkpoint), *wrong]) == 2
    assert "expected a text to continue, or else --interactive" in capsys.readouterr().err

    monkeypatch.setattr("sys.stdin", io.StringIO(f"The import\n\n{'long ' * 99}\nof"))
    assert script.main([str(checkpoint), "--interactive", "--max-new-tokens", "5", "--seed", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(first + "of") and "error: prompt: expected fewer tokens" in shown.err


def test_a_run_folder_is_its_newest_whole_checkpoint(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for step in (2, 10, 11):
        shutil.copytree(checkpoint, tmp_path / "run" / f"step{step}")
    with pytest.raises(UserError, match="it has step2, step10, step11"):  # none was finished
        load_decoder(tmp_path / "run", CPU)
    for step in (2, 10):
        (tmp_path / "run" / f"step{step}" / ".metadata.json").write_text("{}")
        (tmp_path / "run" / f"step{step}" / "train").mkdir()
        (tmp_path / "run" / f"step{step}" / "train" / "rank0.pt").write_bytes(b"")
        write_checksums(tmp_path / "run" / f"step{step}")
    load_decoder(tmp_path / "run", CPU)
    assert f"{tmp_path / 'run'}: step10 is its newest whole checkpoint" in caplog.text
    (tmp_path / "run" / "step10" / "config.json").write_text("{}")
    assert choose_checkpoint(tmp_path / "run").name == "step2"
    (tmp_path / "run" / "step2" / "config.json").unlink()
    with pytest.raises(UserError, match="checkpoint: expected a whole checkpoint"):
        choose_checkpoint(tmp_path / "run")
