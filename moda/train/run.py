"""``train``: one run from its configuration to its last checkpoint, resumed where it stopped."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.exceptions import OLMoConfigurationError, OLMoEnvironmentError
from olmo_core.io import is_url
from olmo_core.train import LoadStrategy, Trainer, teardown_training_environment
from olmo_core.train.callbacks import Callback
from olmo_core.utils import get_default_device
from omegaconf import OmegaConf
from rich.table import Table

from moda.config.schema import RunConfig
from moda.data import TrainingData, build_training_data
from moda.data.sources import preview
from moda.errors import UserError
from moda.typed import to_dict

from .build import build_data_loader, build_train_module, build_trainer
from .checkpoints import changed_settings, check_same_model, find_resumable
from .environment import console, launched_world_size, prepare_environment, set_up_logging
from .metrics import METRICS_FILE, read_metrics
from .plan import Plan, make_plan
from .progress import format_duration

__all__ = ["Outcome", "plan", "print_plan", "train"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``stopped_by`` names the signal that ended it early."""

    steps: int
    stopped_by: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """0, or the shell's code of the signal that stopped the run."""
        return 0 if self.stopped_by is None else 128 + int(self.stopped_by)


def plan(config: RunConfig) -> Plan:
    """Check a configuration for the processes that were launched.

    :raises UserError: naming the key.
    """
    return make_plan(config, launched_world_size())


def print_plan(p: Plan) -> None:
    """The resolved configuration and what it comes to (``--dry-run``)."""
    console.print(OmegaConf.to_yaml(OmegaConf.create(to_dict(p.config))), highlight=False, markup=False, end="")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in p.rows():
        table.add_row(name, value)
    console.print()
    console.print(table)
    _print_data(p)


def _print_data(p: Plan) -> None:
    """What the run would draw from where. Data that is not here is said, not refused: a dry run may be elsewhere."""
    train = p.config.train
    total = p.steps * train.tokens_per_step
    try:
        drawn = preview(p.config.data, p.tokenizer, train.sequence_length, total, train.tokens_per_step)
    except UserError as e:
        if p.config.data.mixture is not None:
            raise
        console.print(f"data: not looked at ({e})", highlight=False, markup=False, soft_wrap=True)
        return
    if not drawn:
        console.print("data: text, tokenized at the first start")
        return
    whole = sum(d.tokens or 0 for d in drawn)
    table = Table(title="data", title_justify="left")
    for heading in ("source", "files", "tokens there", "tokens in the dataset", "share", "times through"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for d in drawn:
        if d.tokens is None or not d.available:
            row = ("not asked (remote)", "", "", "")
        else:
            row = (f"{d.available:,}", f"{d.tokens:,}", f"{d.tokens / whole:.2%}", f"{d.tokens / d.available:.2f}")
        table.add_row(d.name, f"{d.files:,}", *row)
    console.print(table)
    if whole:
        console.print(f"the run's {total:,} tokens are {total / whole:.2f} times through the dataset", highlight=False)


def _prepare_data(p: Plan) -> TrainingData:
    """Check and, for text, tokenize the data: rank 0 first, the others once it is there. An error reaches every rank."""
    error: UserError | None = None
    data: TrainingData | None = None
    if get_rank() == 0:
        try:
            data = _build(p)
        except UserError as e:
            error = e
    error = broadcast_object(error)
    if error is not None:
        raise error
    return _build(p) if data is None else data


def _build(p: Plan) -> TrainingData:
    train = p.config.train
    return build_training_data(
        p.config.data,
        p.tokenizer,
        train.sequence_length,
        total_tokens=p.steps * train.tokens_per_step,
        tokens_per_step=train.tokens_per_step,
    )


def _save_config(config: RunConfig) -> None:
    if get_rank() != 0:
        return
    path = Path(config.log_folder) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    scratch.replace(path)


#: Further callbacks for a run, made once its trainer is there (the evaluation package registers its tasks so).
ExtraCallbacks = Callable[[Plan, Trainer], dict[str, Callback]]


def train(config: RunConfig, extra_callbacks: ExtraCallbacks | None = None) -> Outcome:
    """Run a configuration, resuming from the newest whole checkpoint of its save folder.

    :param extra_callbacks: gives further callbacks, by name, for the trainer.

    :raises UserError: for what cannot work, before any training.
    """
    p = plan(config)
    try:
        Path(config.log_folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError("train.save_folder", "a folder that can be written", config.log_folder, str(e)) from None
    prepare_environment(config.train.seed)
    set_up_logging(config.log_folder)
    try:
        return _train(p, extra_callbacks)
    except (OLMoConfigurationError, OLMoEnvironmentError) as e:
        raise UserError("configuration", "settings that OLMo-core accepts", hint=str(e)) from e
    finally:
        teardown_training_environment()


def _train(p: Plan, extra_callbacks: ExtraCallbacks | None) -> Outcome:
    config = p.config
    started = time.monotonic()
    checkpoint: str | None = None
    if get_rank() == 0:
        found = find_resumable(config.save_folder)
        checkpoint = None if found is None else str(found)
    checkpoint = broadcast_object(checkpoint)
    source = checkpoint or config.train.load_path
    if source is not None and not is_url(source):
        if not (Path(source) / "model_and_optim" / ".metadata").is_file():
            raise UserError("train.load_path", "the folder of a checkpoint (with model_and_optim/)", source)
        check_same_model(Path(source), config.model)
    data = _prepare_data(p)
    _save_config(config)

    device = get_default_device()
    log.info(
        "%s: %s parameters, %s tokens a step, %s steps, %d process%s on %s",
        config.name,
        f"{p.transformer.num_counted_params:,}",
        f"{config.train.tokens_per_step:,}",
        f"{p.steps:,}",
        p.world_size,
        "" if p.world_size == 1 else "es",
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )
    module = build_train_module(p, device)
    loader = build_data_loader(p, data, module)
    trainer = build_trainer(p, data, module, loader)
    for name, callback in (extra_callbacks(p, trainer) if extra_callbacks is not None else {}).items():
        trainer.add_callback(name, callback)
    if checkpoint is not None:
        _resume(trainer, checkpoint, config)
    elif config.train.load_path is not None:
        _start_from(trainer, config.train.load_path)
    if trainer.global_step >= p.steps:
        log.info("this run is complete at step %d: nothing to do", trainer.global_step)
    else:
        if not is_url(config.save_folder):  # a remote folder is looked through by OLMo-core itself
            trainer.load_strategy = LoadStrategy.never  # what was to be loaded has been
        trainer.fit()
    if get_rank() == 0:
        _summarise(config, trainer.global_step, time.monotonic() - started)
    return Outcome(trainer.global_step, _signal_of(trainer))


def _resume(trainer: Trainer, checkpoint: str, config: RunConfig) -> None:
    """Go on from a checkpoint of this run, saying which settings have changed since.

    :raises UserError: if the run was begun with other data.
    """
    try:
        trainer.load_checkpoint(checkpoint, load_trainer_state=True, load_optim_state=True)
    except RuntimeError as e:
        if "fingerprint" not in str(e):
            raise
        raise UserError(
            "data", f"the data that the run in {config.save_folder} was begun with", "other data",
            "choose another train.save_folder, and train.load_path to start from its weights",
        ) from None  # fmt: skip
    log.info("resuming from %s", checkpoint)
    for change in changed_settings(Path(checkpoint), config):
        log.warning("this run was begun with another setting of %s", change)


def _start_from(trainer: Trainer, source: str) -> None:
    """Load a checkpoint's weights, and nothing else of it, into a run that begins."""
    weights = source if is_url(source) else str(Path(source) / "model_and_optim")
    trainer.load_checkpoint(weights, load_trainer_state=False, load_optim_state=False)
    log.info("starting from the weights of %s", source)


def _signal_of(trainer: Any) -> signal.Signals | None:
    reason = trainer._cancel_reason or ""
    return next((s for s in (signal.SIGTERM, signal.SIGINT) if s.name in reason), None)


def _first_last(lines: list[dict[str, Any]], key: str) -> tuple | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return (values[0], values[-1]) if values else None


def _summarise(config: RunConfig, steps: int, seconds: float) -> None:
    """Losses and perplexities before and after, time, and where everything is."""
    folder = Path(config.log_folder)
    metrics = folder / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else []
    table = Table(title=f"{config.name}: {steps} steps in {format_duration(seconds)}", title_justify="left")
    for heading in ("validation", "loss before", "after", "perplexity before", "after", "fall"):
        table.add_column(heading, justify="left" if heading == "validation" else "right", no_wrap=True)
    keys = ["loss", *sorted({k for line in lines for k in line if k.startswith("eval/") and k.endswith("/loss")})]
    for key in keys:
        ends = _first_last(lines, key)
        if ends is None:
            continue
        before, after = ends
        name = "training batch" if key == "loss" else key.removeprefix("eval/").removesuffix("/loss")
        fall = math.exp(before - after)
        row = (f"{before:.3f}", f"{after:.3f}", f"{math.exp(before):,.1f}", f"{math.exp(after):,.1f}", f"{fall:,.1f}x")
        table.add_row(name, *row)
    console.print(table)
    console.print(f"config.yaml, train.log, {METRICS_FILE} and summary.json: {folder}", soft_wrap=True, highlight=False)
    console.print(f"checkpoints: {config.save_folder}/step*", soft_wrap=True, highlight=False)
    with (folder / "summary.json").open("w") as f:
        json.dump(
            {"steps": steps, "seconds": seconds, "metrics": {k: _first_last(lines, k) for k in keys}}, f, indent=1
        )
