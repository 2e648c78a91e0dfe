"""Small checkpoints made without training: random weights large enough that answers differ, saved as the trainer saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.checkpoint import save_state_dict

from moda.config.schema import RunConfig
from moda.data import load_tokenizer
from moda.model import transformer_config
from moda.typed import from_dict, to_dict

HUB = "allenai/gpt-neox-olmo-dolma-v1_5"
MODEL: dict[str, Any] = dict(
    d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, ffn_hidden_size=24, norm_placement="post",
    pad_vocab_to=64, depth=dict(mechanism="moda", attention="reuse", ffn=True),
)  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + (1.0 if p.ndim == 1 else 0.0))
    return model


def run_config(tokenizer: Path, model: dict[str, Any] | None = None, sequence_length: int = 8192) -> RunConfig:
    return from_dict(
        RunConfig,
        {
            "name": "tiny",
            "model": MODEL if model is None else model,
            "data": {"paths": ["none"], "tokenizer": {"identifier": str(tokenizer), "hub": HUB}},
            "train": {"sequence_length": sequence_length, "max_steps": 10},
        },
    )


def save_checkpoint(
    folder: Path, config: RunConfig, seed: int = 0, spoil: Callable[[torch.Tensor], Any] | None = None,
    spoilt: str = "blocks.1.attention_norm.weight",
) -> torch.nn.Module:  # fmt: skip
    """Write ``folder`` as the trainer does, and return the model in it.

    :param spoil: changes the parameter ``spoilt`` in the checkpoint.
    """
    vocab = load_tokenizer(config.data.tokenizer).config.vocab_size  # type: ignore[arg-type]
    model = randomise(transformer_config(config.model, vocab).build(init_device="cpu"), seed)
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if spoil is not None:
        name = f"model.{spoilt}"
        state[name] = state[name].clone()
        spoil(state[name])
    save_state_dict(str(folder / "model_and_optim"), state)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return model.eval()
