"""Windows, losses and sets against plain computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from olmo_core.data import NumpyDatasetDType, NumpyPaddedFSLDatasetConfig, TokenizerConfig
from olmo_core.data.utils import get_labels

from moda.config.schema import DataConfig
from moda.data import build_training_data
from moda.errors import UserError
from moda.train.validation import NextTokenEvaluator
from moda_evals.model import ScoredModel, load
from moda_evals.perplexity import Windows, evaluate_set, loss_error, windows
from moda_evals.sets import PAPER_SETS, SETS, OpenSet, Text, TokenFiles, open_sets, resolve_sets
from moda_evals.tasks import TASKS, load_questions
from tests.small_checkpoint import run_config, save_checkpoint


def documents(folder: Path, lengths: list, seed: int = 0) -> Path:
    """A token file of random documents, each ended by token 0."""
    rng = np.random.default_rng(seed)
    parts = [np.append(rng.integers(1, 600, n - 1), 0) for n in lengths]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "part-0-00000.npy"
    np.concatenate(parts).astype(np.uint16).tofile(path)
    return path


def token_set(path: Path, model: ScoredModel) -> OpenSet:
    return TokenFiles("x", "x", (str(path),)).open(model)


@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 30, 31])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_windows_predict_every_token_once(n: int, stride: int) -> None:
    size = 8
    predicted: list = []
    for begin, end, first in windows(n, Windows(size, stride)):
        assert end - begin <= size and begin < first < end
        assert first - begin >= min(first, size - stride)
        predicted += range(first, end)
    left_out = {k for k in range(8, n, 8)} if stride == size else set()
    assert predicted == [t for t in range(1, n) if t not in left_out]


def slow_loss(model, ids: np.ndarray, cut: Windows) -> tuple:
    """Every token by itself, from the context that its window gives it."""
    losses = []
    for t in range(1, len(ids)):
        begin = 0
        while t >= begin + cut.size:
            begin += cut.stride
        if begin == t:
            continue
        if cut.head and t >= cut.size:
            break
        with torch.no_grad():
            logits = model.module(torch.tensor(ids[begin:t].astype(np.int64))[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[int(ids[t])].item())
    return sum(losses), len(losses)


@pytest.mark.parametrize("cut", [Windows(12, 5), Windows(12, 12), Windows(12, 6, head=True)], ids=str)
def test_against_one_token_at_a_time(cut: Windows, model, tmp_path: Path) -> None:
    path = documents(tmp_path, [3, 12, 29, 13, 2])
    result = evaluate_set(model, token_set(path, model), cut, batch_tokens=64)
    tokens = np.fromfile(path, dtype=np.uint16)
    parts = [slow_loss(model, d, cut) for d in np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]]
    assert result["tokens_scored"] == sum(n for _, n in parts)
    assert result["loss"] == pytest.approx(sum(x for x, _ in parts) / sum(n for _, n in parts), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["documents"]["tokens"] == [n for _, n in parts]


def test_head_is_olmo_core_in_loop_validation(model, tmp_path: Path) -> None:
    path = documents(tmp_path, [5, 40, 16, 17, 90], seed=3)
    config = TokenizerConfig(vocab_size=600, eos_token_id=0, pad_token_id=1)
    dataset = NumpyPaddedFSLDatasetConfig(
        paths=[str(path)], sequence_length=16, tokenizer=config, work_dir=str(tmp_path), dtype=NumpyDatasetDType.uint16
    ).build()
    dataset.prepare()
    in_loop = NextTokenEvaluator(name="lm", batches=[], labels=["x"], device=torch.device("cpu"))
    count = 0
    for i in range(len(dataset)):
        item = dataset[i]
        batch = {"input_ids": item["input_ids"].long()[None], "label_mask": item["label_mask"][None]}
        labels = get_labels(batch)
        with torch.no_grad():
            logits = model.module(batch["input_ids"])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        in_loop.update_metrics({"predicts": labels >= 0, "metadata": [{"label": "x"}]}, losses, None)
        count += int((labels >= 0).sum())
    result = evaluate_set(model, token_set(path, model), Windows(16, 16, head=True), batch_tokens=64)
    assert result["tokens_scored"] == count
    assert result["loss"] == pytest.approx(in_loop.compute_metrics()["x/CE loss"].item(), rel=1e-5)


def test_text_and_bits_per_byte(model, tmp_path: Path) -> None:
    texts = ["Ein Satz über Käse.", "and another one, longer than the first by some words"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    result = evaluate_set(model, Text("t", "t", (str(tmp_path),)).open(model), Windows(64, 32))
    n_bytes = sum(len(t.encode()) for t in texts)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens_scored"] / math.log(2) / n_bytes)
    assert result["n"] == 2


def test_text_is_tokenized_as_training_data_is(tokenizer_file: Path, tmp_path: Path) -> None:
    """Nothing is put before a text, nor read out of it, whatever the tokenizer's post-processor would do."""
    tok = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tok.save(str(tmp_path / "tokenizer.json"))
    assert tok.encode("a").ids[0] == 0
    checkpoint = tmp_path / "run" / "step1"
    save_checkpoint(checkpoint, run_config(tmp_path / "tokenizer.json"))
    model = load(str(checkpoint))
    texts = [f"Text {i}: not an <|endoftext|> token, naïve as it looks. " * (i + 1) for i in range(5)]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    sources = [str(tmp_path / "text")]
    assert model.tokenizer_info is not None
    data = DataConfig(text=sources, validation_fraction=0.3, work_dir=str(tmp_path / "work"))
    build_training_data(data, model.tokenizer_info, 8)
    sets = [Text("text", "text", tuple(sources)), TokenFiles("tokens", "tokens", (str(tmp_path / "work/*/*/*.npy"),))]
    opened, _ = open_sets(sets, model)
    ours, prepared = (evaluate_set(model, entry, Windows(64, 32)) for entry in opened)
    assert ours["n"] == prepared["n"] == 5 and ours["tokens_scored"] == prepared["tokens_scored"]
    assert ours["perplexity"] == pytest.approx(prepared["perplexity"], rel=1e-6)
    question = load_questions(TASKS["copa"], model.tokenizer, 1)[0]
    assert 0 not in question.choices[0].context and model.tokenizer.decode([0, 70, 0]) == tok.decode([70])


def test_does_not_depend_on_the_batch_size(model, tmp_path: Path) -> None:
    path = documents(tmp_path, [50, 7, 33, 120])
    sets = token_set(path, model)
    a, b = (evaluate_set(model, sets, Windows(32, 16), batch_tokens=n)["loss"] for n in (1, 4096))
    assert a == pytest.approx(b, abs=1e-5)


def test_standard_error_is_that_of_a_ratio() -> None:
    """Against the spread of many simulated sets."""
    rng = np.random.default_rng(0)

    def draw() -> tuple:
        tokens = rng.integers(10, 200, 300).astype(float)
        return tokens * (3 + 0.5 * rng.standard_normal(300)), tokens

    estimates = [loss_error(*draw()) for _ in range(50)]
    spread = np.std([losses.sum() / tokens.sum() for losses, tokens in (draw() for _ in range(2000))])
    assert np.mean(estimates) == pytest.approx(spread, rel=0.08)


def test_the_paper_sets_and_what_is_missing(model, tmp_path: Path) -> None:
    base = tmp_path / "eval-data" / "perplexity" / "v3_small_gptneox20b"
    paper: Any = resolve_sets(PAPER_SETS)
    for entry in paper[:-1]:
        documents(base / entry.label / "val", [9, 5])
    with pytest.raises(UserError, match="stack: expected the token file .*dolma_stack.*prepare_data.py mirror"):
        open_sets(paper, model, str(tmp_path))
    opened, missing = open_sets(paper, model, str(tmp_path), skip_missing=True)
    assert [s.name for s in opened] == list(PAPER_SETS[:-1]) and list(missing) == ["stack"]
    assert [SETS[name].title for name in PAPER_SETS] == [
        "C4", "ICE", "m2d2-s2orc", "Pile", "Wiki-text", "Books", "CC", "peS2o", "Reddit", "Stack",
    ]  # fmt: skip
    with pytest.raises(UserError, match="did you mean 'reddit'"):
        resolve_sets(["redit"])
    with pytest.raises(UserError, match="--base-dir"):
        open_sets(paper, model)


def test_bad_windows_and_files(model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--stride"):
        Windows(16, 17)
    path = documents(tmp_path, [9])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="whole uint16 ids"):
        token_set(path, model)
    np.asarray([5, 60_000, 0], dtype=np.uint16).tofile(path)
    with pytest.raises(UserError, match="ids below the 600"):
        evaluate_set(model, token_set(path, model), Windows(8, 8))
    with pytest.raises(UserError, match="--window"):
        evaluate_set(model, token_set(path, model), Windows(9000, 8))
