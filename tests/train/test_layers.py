"""Figures of single layers, written while two ranks train."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moda.generate import load_decoder
from moda.visualize import look
from tests.tiny import run, write_config


@pytest.mark.slow
def test_layers_are_measured_and_training_stays_as_it_is(tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint=dict(interval=3))
    folders = [tmp_path / "watched", tmp_path / "plain"]
    for folder, interval in zip(folders, ("2", "null")):
        options = ["train.max_steps=4", f"train.save_folder={folder}", f"logging.layers_interval={interval}"]
        done = run(config, *options, processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    watched, plain = ([json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in folders)
    assert [line["loss"] for line in watched] == [line["loss"] for line in plain]
    names = {name.split("/")[0] for line in watched for name in line if "/layer" in name}
    assert names == {"grad_norm", "stream_rms", "depth_mass", "sink_mass"}
    assert [line["step"] for line in watched if "depth_mass/layer0" in line] == [2, 4]
    last = watched[-1]
    assert last["depth_mass/layer0"] == 0 < last["depth_mass/layer1"] < 1
    of_blocks = math.sqrt(sum(last[f"grad_norm/layer{i}"] ** 2 for i in range(3)))
    assert 0 < of_blocks < last["grad_norm"]  # which the embedding has a part in
    # At step 4 the weights are those saved at step 3; the mean over tokens depends on the batch, but not on much.
    decoder, tokenizer, _ = load_decoder(str(folders[0] / "step3"), torch.device("cpu"))
    ids = list(range(32))
    seen = look(decoder, ids, [str(i) for i in ids], "step3")
    assert last["depth_mass/layer2"] == pytest.approx(seen.depth_mass()[2].mean().item(), rel=0.3)
