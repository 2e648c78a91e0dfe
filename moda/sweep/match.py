"""Runs made equal: in parameters or FLOPs by the width of the FFN or the number of layers, in FLOPs or time by tokens."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from moda.config import RunConfig
from moda.data import load_tokenizer
from moda.errors import UserError
from moda.model import ModelTransformerConfig, transformer_config

from .spec import By, Cell, MatchSection
from .state import tokens_per_second

#: Values that a size is tried at: multiples of these.
_STEPS = {"model.ffn_hidden_size": 16, "model.n_layers": 1}
#: Further from its reference than this a run is not equal to it.
_FAR = 0.05


def model_of(config: RunConfig) -> ModelTransformerConfig:
    """A run's model, in the form that counts its parameters and FLOPs."""
    if config.model.vocab_size is not None:
        return transformer_config(config.model)
    assert not isinstance(config.data.tokenizer, str)
    return transformer_config(config.model, load_tokenizer(config.data.tokenizer).config.vocab_size)


def flops_per_token(config: RunConfig) -> int:
    """Training FLOPs per token, causal attention counted half."""
    return model_of(config).num_flops_per_token(config.train.sequence_length)


def tokens_of(config: RunConfig) -> int:
    """Tokens of a whole run."""
    return config.train.steps * config.train.tokens_per_step


def _nearest(measure: Callable[[int], int], target: int, start: int, step: int) -> int:
    """The multiple of ``step`` at which a measure that rises about linearly is nearest to ``target``."""
    n = max(start // step, 1)
    for _ in range(20):
        slope = measure((n + 1) * step) - measure(n * step)
        before, n = n, max(n + round((target - measure(n * step)) / slope), 1)
        if n == before:
            break
    return min((m * step for m in (n - 1, n, n + 1) if m > 0), key=lambda size: abs(measure(size) - target))


def _resize(cell: Cell, reference: Cell, section: MatchSection) -> Cell:
    key = section.change
    assert key is not None
    name, config = key.removeprefix("model."), cell.config
    before = getattr(config.model, name)

    def count(config: RunConfig) -> int:
        return model_of(config).num_counted_params if section.by == By.params else flops_per_token(config)

    @functools.cache
    def measure(size: int) -> int:
        return count(replace(config, model=replace(config.model, **cast(Any, {name: size}))))

    target = count(reference.config)
    size = _nearest(measure, target, before, _STEPS[key])
    if size == before:
        return cell
    off = measure(size) / target - 1
    if abs(off) > _FAR:
        raise UserError(
            f"run {cell.name}", f"a {key} that gives the {section.by.value} of {reference.name}", "none does"
        )
    return cell.with_key(key, size, f"{name} {before:,} -> {size:,} ({section.by.value} {off:+.2%})")


def _speed(section: MatchSection, cell: Cell) -> float:
    assert section.measured is not None
    speed = tokens_per_second(Path(section.measured) / cell.name)
    if speed is None:
        raise UserError("match.measured", f"a folder with a finished run {cell.name}", section.measured)
    return speed


def _budget(cell: Cell, reference: Cell, section: MatchSection) -> Cell:
    """Another number of tokens, whole steps."""
    if section.by == By.time:
        ratio = _speed(section, cell) / _speed(section, reference)
    else:
        ratio = flops_per_token(reference.config) / flops_per_token(cell.config)
    step, before = cell.config.train.tokens_per_step, tokens_of(cell.config)
    tokens = max(1, round(tokens_of(reference.config) * ratio / step)) * step
    if tokens == before:
        return cell
    changed = f"tokens {before:,} -> {tokens:,}"
    if cell.config.train.max_steps is not None:
        return cell.with_key("train.max_steps", tokens // step, changed)
    return cell.with_key("train.max_tokens", tokens, changed)


def equalise(cells: Sequence[Cell], section: MatchSection, reference: Mapping[str, str]) -> list[Cell]:
    """The runs, changed so that each equals its reference: the run with the same labels but for those of ``reference``.

    :raises UserError: where a run's reference is excluded or a size would have to be below its least value.
    """
    by_labels = {(*cell.labels.items(), cell.seed): cell for cell in cells}
    changed = []
    for cell in cells:
        other = by_labels.get((*{**cell.labels, **reference}.items(), cell.seed))
        if other is None:
            raise UserError("match.to", f"a run for {cell.name} to be compared with", "an excluded one")
        if other is cell:
            changed.append(cell)
        elif section.change == "train.max_tokens":
            changed.append(_budget(cell, other, section))
        else:
            changed.append(_resize(cell, other, section))
    return changed
