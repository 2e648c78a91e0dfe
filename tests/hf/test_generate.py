"""Generation with a cache against recomputing everything for every token, by the model that was trained."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import tokenizers
import torch

from moda.checkpoints import load_model, open_checkpoint
from moda.config.schema import TokenizerSection
from moda.data import load_tokenizer
from moda.errors import UserError
from moda.generate import Sampling, generate, load_decoder, stream_text
from moda.hf import write_export
from moda.hf.decoder_moda import KVCache
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
    cache = KVCache()
    with torch.no_grad():
        decoder(torch.arange(10)[None], cache)
        decoder(torch.arange(1)[None], cache)
    assert [k.shape[2] for k, _ in cache.layers] == [11] * 3
    assert not any(isinstance(v, torch.Tensor) for m in decoder.modules() for n, v in vars(m).items() if n[0] != "_")


def test_sampling(checkpoint: Path) -> None:
    decoder, _, _ = load_decoder(checkpoint, CPU)
    draws = [list(generate(decoder, [3], max_new_tokens=15, sampling=Sampling(1.0, seed=s))) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert {Sampling(1.0, top_p=0.7).choose(p, None) for _ in range(200)} == {0, 1}
    assert {Sampling(1.0, top_k=3).choose(p, None) for _ in range(400)} == {0, 1, 2}
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


def test_command_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "scripts" / "generate.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(checkpoint), "The import", "--max-new-tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("The import")
    assert script.main([str(checkpoint), "", "--max-new-tokens", "5"]) == 2
    assert "at least one token" in capsys.readouterr().err
