"""Matrix products of the blocks' linears in float8, through OLMo-core's ``Float8Config`` and torchao.

Parameters keep their names and dtypes, and so do gradients, optimizer state and checkpoints. A product scales and rounds both of
its operands anew each time: to e4m3, and with ``tensorwise`` the gradients of outputs to e5m2. With ``rowwise`` each row of the
left one and each column of the right one has a scale, a power of two. What is rounded is what the model computes with, such as
the bf16 copy of an fp32 weight. Embedding, head, norms, attention and what a depth mechanism keeps outside of the blocks stay.
"""

from __future__ import annotations

import importlib
import logging
import re
from importlib.util import find_spec

import torch
import torch.nn as nn
from olmo_core.float8 import AOFloat8LinearRecipe, Float8Config
from olmo_core.nn.transformer import Transformer

from moda.config.choices import Checkpointing, Float8
from moda.config.schema import RunConfig
from moda.errors import UserError
from moda_kernels.moda_attention.quantised import fp8_missing

__all__ = ["apply_float8", "check_float8"]

log = logging.getLogger(__name__)

#: What the sizes of a product must be multiples of, tokens included: those are the inner dimension of a weight's gradient.
_MULTIPLE = 16


def check_float8(config: RunConfig) -> None:
    """Refuse ``train.float8`` where it cannot run.

    :param config: without ``auto``.

    :raises UserError: for it.
    """
    recipe, parallel = config.train.float8, config.parallel
    if recipe is None:
        return
    tokens = config.train.microbatch * config.train.sequence_length // parallel.context
    expected: str | None = None
    hint: str | None = None
    if find_spec("torchao") is None:
        expected, hint = "null without torchao", "pip install -e '.[float8]'"
    elif torch.cuda.is_available() and (hint := fp8_missing(torch.device("cuda", torch.cuda.current_device()))):
        expected = "null on this GPU"
    elif parallel.tensor > 1:
        expected, hint = "null with parallel.tensor", "its products take no tensors that are split over ranks"
    elif recipe == Float8.rowwise and parallel.activation_checkpointing == Checkpointing.selected_ops:
        expected = "tensorwise or null with parallel.activation_checkpointing: selected_ops"
        hint = "it would keep the absolute values of all that is rounded"
    elif tokens % _MULTIPLE:
        expected = f"null where a process runs {tokens} tokens at a time"
        hint = f"train.microbatch_size x train.sequence_length / parallel.context must be a multiple of {_MULTIPLE}"
    if expected is not None:
        raise UserError("train.float8", expected, recipe.value, hint)


def apply_float8(model: Transformer, recipe: Float8) -> None:
    """Let the linears of a model's blocks multiply in float8, but for those whose sizes it does not take, which are logged.

    :param model: before it is compiled, checkpointed or sharded.

    :raises UserError: if there is none.
    """
    quiet = logging.getLogger("torchao")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of libraries that it cannot load here, of which none is for this
    importlib.import_module("torchao")
    quiet.setLevel(level)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = {name: module for name, module in linears.items() if name.startswith("blocks.")}
    outside = [name for name in linears if name not in blocks and name != "lm_head.w_out"]  # which OLMo-core names
    model.apply_fp8(Float8Config(ao_recipe=AOFloat8LinearRecipe(recipe.value), modules_to_ignore=outside))
    kept = {name: module for name, module in blocks.items() if model.get_submodule(name) is module}  # not replaced
    if len(kept) == len(blocks):
        expected = f"null for a model without linears whose sizes are multiples of {_MULTIPLE}"
        raise UserError("train.float8", expected, recipe.value)
    done = f"{len(blocks) - len(kept)} of {len(blocks)}"
    log.info("%s linears of the blocks multiply in float8 (%s)", done, recipe.value)
    if kept:
        sizes = {re.sub(r"\.\d+\.", ".*.", name): " x ".join(map(str, m.weight.shape)) for name, m in kept.items()}
        which = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        log.warning("train.float8: not multiples of %d, and so without float8: %s", _MULTIPLE, which)
