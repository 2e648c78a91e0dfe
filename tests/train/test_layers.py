"""Figures of single layers, written while two ranks train."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moda.generate import load_decoder
from moda.hf import section_of
from moda.model.transformer import DepthTransformer
from moda.train.layers import LayersCallback
from moda.visualize import look
from tests.small_checkpoint import run_config, save_checkpoint
from tests.tiny import make_tokenizer, run, write_config


@pytest.mark.slow
def test_layers_are_measured_and_training_stays_as_it_is(tmp_path: Path) -> None:
    config = write_config(tmp_path)
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


def test_a_look_is_that_of_the_exported_model(tmp_path: Path) -> None:
    config = run_config(make_tokenizer(tmp_path / "tokenizer.json"))
    model = save_checkpoint(tmp_path / "step3", config)
    assert isinstance(model, DepthTransformer)
    callback = LayersCallback(model=section_of(model.config))
    callback._trainer = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    callback._tokens = torch.arange(32)
    found = callback._look({n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)})
    decoder, _, _ = load_decoder(str(tmp_path / "step3"), torch.device("cpu"))
    seen = look(decoder, list(range(32)), [""] * 32, "")
    assert seen.streams is not None
    for layer in range(3):
        assert found[f"depth_mass/layer{layer}"] == pytest.approx(seen.depth_mass()[layer].mean().item(), rel=1e-6)
        assert found[f"sink_mass/layer{layer}"] == pytest.approx(seen.sink_mass()[layer].mean().item(), rel=1e-6)
        assert found[f"stream_rms/layer{layer}"] == pytest.approx(
            seen.streams[layer].square().mean().sqrt().item(), rel=1e-6
        )
