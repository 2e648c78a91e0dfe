"""Which parameters weight decay leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moda.config import load_config
from moda.train.build import build_train_module
from moda.train.plan import make_plan
from tests.tiny import write_config


@pytest.mark.parametrize(
    "depth, spared",
    [
        ("null", set()),
        ("{mechanism: moda}", set()),
        ("{mechanism: value_residual}", {"blocks.1.depth.weights", "blocks.2.depth.weights"}),
        ("{mechanism: value_residual, learned: false}", set()),
        ("{mechanism: denseformer}", {f"depth.averages.{i}" for i in range(3)}),
    ],
)
def test_embeddings_and_what_the_mechanism_names_do_not_decay(depth: str, spared: set[str], tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), [f"model.depth={depth}"])
    built = build_train_module(make_plan(config, 1), torch.device("cpu"))
    names = {id(p): name for name, p in built.model.named_parameters()}
    groups = built.optim.param_groups
    without = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert without == {"embeddings.weight", *spared}
    assert all(
        group["weight_decay"] == 0.1 for group in groups if not {names[id(p)] for p in group["params"]} <= without
    )
