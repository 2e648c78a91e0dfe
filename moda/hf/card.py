"""The model card of an exported folder: what the checkpoint says about itself, and how to load it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import moda
from moda.checkpoints import Checkpoint, read_trainer_state
from moda.config.model import ModelConfig
from moda.errors import UserError

log = logging.getLogger(__name__)

__all__ = ["model_card"]

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [moda, pretraining]
---

# {name}

A decoder-only language model, {what}, pretrained with MoDA {version}. It continues text: it is not
tuned to follow instructions, and nothing was done against harmful or false output.

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False).input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```

The folder holds the modelling code, which `trust_remote_code=True` runs: it needs torch and transformers only.
"""


def _data(data: Any) -> str | None:
    """The names of what was trained on; where it lay on the machine that trained is nobody's business."""
    if not isinstance(data, dict):
        return None
    if isinstance(mix := data.get("mix"), str):
        return mix
    mixture = data.get("mixture")
    if isinstance(mixture, dict) and isinstance(mixture.get("sources"), dict):
        return ", ".join(map(str, mixture["sources"]))
    given = data.get("text") or data.get("paths") or []
    names = list(dict.fromkeys(Path(str(p)).name for p in ([given] if isinstance(given, str) else given)))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or None


def _training(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    try:
        state = read_trainer_state(checkpoint.folder) or {}
    except UserError as e:  # weights can be exported without it
        log.warning("not read for the model card: %s", e)
        state = {}
    step, tokens = state.get("global_step"), state.get("global_train_tokens_seen")
    if not isinstance(step, int) and (match := re.fullmatch(r"step(\d+)", checkpoint.folder.resolve().name)):
        step = int(match[1])
    if isinstance(step, int):
        rows.append(("training steps", f"{step:,}"))
    if isinstance(tokens, int):
        rows.append(("training tokens", f"{tokens:,}"))
    if data := _data(checkpoint.settings.get("data")):
        rows.append(("training data", data))
    return rows


def model_card(
    checkpoint: Checkpoint, section: ModelConfig, parameters: int, dtype: str, evaluation: str | None = None
) -> str:
    """Markdown for ``README.md``, with what is known of the model, its training and its evaluation.

    :param evaluation: tables of its results.
    """
    depth = section.depth
    what = "an OLMo2 decoder"
    if depth is not None:
        paper = re.sub(r"^arXiv (\S+)$", r"[arXiv \1](https://arxiv.org/abs/\1)", depth.source)
        what += f" with the depth mechanism `{depth.name}` ({paper})"
    heads = f"{section.n_heads} query, {section.n_kv_heads} key/value, of width {section.head_dim}"
    rows = [
        ("parameters", f"{parameters:,} ({dtype})"),
        ("layers, width, FFN width", f"{section.n_layers}, {section.d_model}, {section.ffn_hidden_size}"),
        ("attention heads", heads),
        ("norm placement", section.norm_placement.name),
        *([] if depth is None else depth.describe(section)),
        ("vocabulary", f"{section.vocab_size:,} tokens"),
        ("context length in training", f"{checkpoint.sequence_length or 'unknown'}"),
        *_training(checkpoint),
    ]
    settings = checkpoint.settings.get("name")
    name = settings if isinstance(settings, str) else checkpoint.folder.resolve().name
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    card = _HEAD.format(name=name, what=what, version=moda.__version__, rows=table)
    return card if evaluation is None else f"{card}\n## Evaluation\n\n{evaluation}"
