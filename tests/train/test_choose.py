"""The end of a warm-up with scores of slots: what is chosen, what the new run begins with, and that it goes on from there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moda_cli
from moda.checkpoints import (
    choose_slots,
    damage,
    load_model,
    match_weights,
    open_checkpoint,
    read_weights,
    write_checksums,
)
from moda.config import load_config
from moda.errors import UserError
from moda.files import read_metrics, write_json
from moda.model import transformer_config
from moda.typed import to_dict
from tests.small_checkpoint import MODEL, run_config, save_checkpoint
from tests.tiny import make_tokenizer, run, weights, write_config

LEARNED = {"mechanism": "moda", "read": {"learned": 1}}


def by_layer(folder: Path) -> list[list[float]]:
    found = read_weights(folder, lambda name: name.endswith("scores"))
    return [[], *(found[f"blocks.{layer}.depth.scores"].tolist() for layer in range(1, len(found) + 1))]


def test_the_chosen_model_is_the_other_one_without_the_rest(tmp_path: Path) -> None:
    """Its logits are those of scores that leave out the other slots."""
    config = run_config(make_tokenizer(tmp_path / "tokenizer.json"), {**MODEL, "depth": LEARNED})
    old = tmp_path / "warmup" / "step7"
    learned = save_checkpoint(old, config, seed=2)
    write_json(old / ".metadata.json", {})
    write_json(old / "train" / "rank0.pt", {})
    with pytest.raises(UserError, match="checkpoint: expected a whole checkpoint in .*, got it was cut short"):
        choose_slots(old, tmp_path / "run")
    write_checksums(old)
    shutil.copytree(old, tmp_path / "best")
    with pytest.raises(UserError, match="checkpoint: expected a folder stepN, got .*best"):
        choose_slots(tmp_path / "best", tmp_path / "run")
    write_json(tmp_path / "best" / "train" / "rank0.pt", {"not": "as it was"})
    (tmp_path / "best").rename(tmp_path / "step8")
    with pytest.raises(UserError, match="got train/rank0.pt has"):
        choose_slots(tmp_path / "step8", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    chosen = choose_slots(old, tmp_path / "run")
    scores = by_layer(old)
    best = [max(range(n), key=scores[layer].__getitem__) for layer, n in ((1, 2), (2, 4))]
    assert chosen.slots.layers == ((), *((slot,) for slot in best)) and chosen.scores == [[], scores[1][:2], scores[2]]
    new = tmp_path / "run" / "step7"
    assert damage(new) is None
    assert json.loads((new / "config.json").read_text()) == to_dict(chosen.config)
    dropped = read_weights(old).keys() - read_weights(new).keys()
    unread = [layer for layer in (0, 1) if 2 * layer + 1 not in best]  # layers whose FFN slot nothing reads
    assert unread and dropped == {
        *(f"blocks.{layer}.depth.scores" for layer in (1, 2)),
        *(f"blocks.{layer}.depth.ffn_slot.w_{w}.weight" for layer in unread for w in "kv"),
    }
    with torch.no_grad():
        for layer, slot in zip((1, 2), best):
            p = learned.get_parameter(f"blocks.{layer}.depth.scores")
            p.fill_(-math.inf)[slot] = 0.0
        ids = torch.arange(14).view(2, 7)
        torch.testing.assert_close(load_model(open_checkpoint(new))(ids), learned(ids))


def test_what_cannot_be_chosen_from_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    save_checkpoint(tmp_path / "other", run_config(tokenizer))
    bad = run_config(tokenizer, {**MODEL, "depth": LEARNED})
    save_checkpoint(tmp_path / "nan", bad, spoil=lambda w: w[3:].fill_(math.nan), spoilt="blocks.2.depth.scores")
    for name, words in (
        ("other", "checkpoint: expected one that was trained with model.depth.read: learned, got all"),
        ("nan", "checkpoint: expected a finite score for each of the 4 slots of layer 2, got .*nan"),
        ("absent", "checkpoint: expected an existing checkpoint folder"),
    ):
        with pytest.raises(UserError, match=words):
            choose_slots(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert moda_cli.main(["choose", str(tmp_path / "nan"), str(tmp_path)]) == 2
    assert "OUT: expected a new or empty folder" in capsys.readouterr().err


def test_starting_from_weights_of_other_slots(tmp_path: Path) -> None:
    """Without the projections that the model lacks, and without scores unless both have the same; what it needs must be there."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")

    def model(read: object) -> Any:
        config = run_config(tokenizer, {**MODEL, "depth": {"mechanism": "moda", "read": read}})
        return config, transformer_config(config.model, 320).build(init_device="meta")

    for saved, reads in (
        ({"learned": 1}, ["all", {"recent": 1}, {"kinds": ["attention"]}, {"learned": 2}]),
        ("all", [{"learned": 1}, {"stride": 2}]),
        ({"kinds": ["attention"]}, [{"learned": {"top": 1, "of": {"kinds": ["attention"]}}}]),
        ({"learned": {"top": 1, "of": {"recent": 1}}}, [{"learned": 1}]),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_checkpoint(folder, model(saved)[0])
        there = read_weights(folder)
        for read in reads:
            wanted = dict(model(read)[1].named_parameters())
            found = match_weights(folder, model(read)[1], other_reads=True)
            new = {
                n for n, p in wanted.items() if n.endswith("scores") and (n not in there or there[n].shape != p.shape)
            }
            assert found.keys() == wanted.keys() - new - {"lm_head.w_out.weight"}
            assert bool(new) == (read == reads[0] and saved != {"learned": 1})
            if wanted.keys() != there.keys():
                with pytest.raises(UserError, match=r"\.depth\."):
                    match_weights(folder, model(read)[1])
    with pytest.raises(UserError, match="blocks.0.depth.ffn_slot.w_k.weight"):
        match_weights(tmp_path / "3", model("all")[1], other_reads=True)


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_what_was_chosen(processes: int | None, tmp_path: Path) -> None:
    """From the same step, weights, optimizer and data; and not back."""
    config = write_config(tmp_path, model={"depth": LEARNED}, checkpoint={"interval": 2})
    begun = run(config, "train.max_steps=4", processes=processes)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    old, new = tmp_path / "run" / "step2", tmp_path / "chosen" / "step2"
    assert all(map(any, by_layer(old)[1:]))
    assert moda_cli.main(["choose", str(old), str(tmp_path / "chosen")]) == 0
    assert damage(new) is None
    kept, before = weights(new), weights(old)
    assert kept.keys() < before.keys() and all(torch.equal(kept[name], before[name]) for name in kept)
    file = tmp_path / "chosen" / "config.yaml"
    chosen = load_config(file)
    assert (chosen.name, chosen.save_folder) == ("chosen", str(tmp_path / "chosen"))
    resumed = run(file, processes=processes)
    assert resumed.returncode == 0 and f"resuming from {new}: 2 of 4 steps" in resumed.stdout, resumed.stdout
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl")[-2:] for name in ("chosen", "run"))
    for a, b in zip(ours, theirs, strict=True):  # the same batches, learning rate and nearly the same model
        assert (a["step"], a["lr"]) == (b["step"], b["lr"]) and 0 < abs(a["loss"] - b["loss"]) < 0.01
    assert weights(tmp_path / "chosen" / "step4").keys() == kept.keys()
    back = run(config, f"train.save_folder={tmp_path / 'chosen'}", processes=processes)
    assert back.returncode != 0 and "model.depth.read: expected {'listed': " in back.stderr
