"""What is built from a plan: the optimizer's groups."""

from pathlib import Path

import pytest
import torch

from moda.config import load_config
from moda.train.build import build_train_module
from moda.train.run import plan
from tests.tiny import write_config


@pytest.mark.parametrize(
    ("depth", "part"),
    [
        ({"mechanism": "value_residual", "learned": True}, ".depth.weights"),
        ({"mechanism": "value_residual", "learned": False}, None),
        ({"mechanism": "denseformer"}, "depth.averages."),
        (None, None),
    ],
)
def test_weight_decay_leaves_a_mechanisms_parameters_alone(
    depth: dict | None, part: str | None, tmp_path: Path
) -> None:
    """The embedding, and what the mechanism names; everything else decays."""
    config = load_config(write_config(tmp_path, model={"depth": depth}, train={"compile": False}))
    module = build_train_module(plan(config), torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in module.optim.param_groups for p in group["params"]}
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    exempt = {name for name in trained if name == "embeddings.weight" or (part is not None and part in f".{name}")}
    assert part is None or len(exempt) > 1
    assert {name: decay[id(p)] for name, p in trained.items()} == {
        name: 0.0 if name in exempt else config.optim.weight_decay for name in trained
    }
