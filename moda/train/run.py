"""``train``: one run from its configuration to its last checkpoint, resumed where it stopped."""

import contextlib
import dataclasses
import functools
import logging
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from olmo_core.data.data_loader import NumpyDataLoaderBase
from olmo_core.distributed.utils import get_rank, is_distributed
from olmo_core.exceptions import OLMoConfigurationError, OLMoEnvironmentError
from olmo_core.io import is_url
from olmo_core.train import LoadStrategy, Trainer, teardown_training_environment
from olmo_core.train.callbacks import Callback
from olmo_core.utils import get_default_device
from rich.table import Table
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from moda.checkpoints import (
    STATE,
    changed_settings,
    check_own,
    check_same_model,
    check_same_run,
    embedding_rows,
    find_resumable,
    match_weights,
    saving_alone,
)
from moda.config import RunConfig, to_yaml
from moda.data import TrainingData, build_training_data
from moda.data.sources import preview
from moda.errors import UserError
from moda.files import LOCK, METRICS_FILE, PLAN_FILE, locked, read_json, read_metrics, write_json, write_text
from moda.report import FILES, write_report

from .build import AnyTrainModule, build_data_loader, build_train_module, build_trainer
from .callbacks import ClockCallback, SignalCallback, SpeedCallback
from .environment import LOG_FILE, console, launched_world_size, on_first_rank, prepare_environment, set_up_logging
from .memory import Device, check_memory, out_of_memory, this_machine
from .pipeline import PipelineTrainModule
from .plan import Plan, make_plan
from .progress import format_duration

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


def plan(config: RunConfig, gpus: int | None = None, device: Device | None = None) -> Plan:
    """Check a configuration for the processes that were launched, or for others.

    :param gpus: how many processes, if not those. :param device: see :func:`.plan.make_plan`.

    :raises UserError: naming the key.
    """
    return make_plan(config, gpus or launched_world_size(), device)


def print_plan(p: Plan, rows: list[tuple[str, str]] | None = None) -> None:
    """The resolved configuration and what it comes to (``--dry-run``), with further rows."""
    console.print(to_yaml(p.config), highlight=False, markup=False, end="")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in [*p.rows(), *(rows or [])]:
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
    table = Table(title="data", title_justify="left", box=None, pad_edge=False)
    for heading in ("source", "files", "tokens there", "in the dataset", "share", "times"):
        table.add_column(heading, justify="left" if heading == "source" else "right", overflow="fold")
    for d in drawn:
        if d.tokens is None or not d.available:
            row = ("not asked (remote)", "", "", "")
        else:
            row = (f"{d.available:,}", f"{d.tokens:,}", f"{d.tokens / whole:.2%}", f"{d.tokens / d.available:.2f}")
        table.add_row(d.name, f"{d.files:,}", *row)
    console.print(table)
    if whole:
        times = f"the run's {total:,} tokens are {total / whole:.2f} times through the dataset"
        console.print(times, highlight=False, soft_wrap=True)


def prepare_data(p: Plan) -> TrainingData:
    """Check and, for text, tokenize the data: rank 0 first, the others once it is there."""
    built: list[TrainingData] = []
    on_first_rank(lambda: built.append(_build(p)), "data")
    return built[0] if built else _build(p)


def _build(p: Plan) -> TrainingData:
    train = p.config.train
    return build_training_data(
        p.config.data,
        p.tokenizer,
        train.sequence_length,
        total_tokens=p.steps * train.tokens_per_step,
        tokens_per_step=train.tokens_per_step,
    )


#: Further callbacks for a run, made once its trainer is there (the evaluation package registers its tasks so).
ExtraCallbacks = Callable[[Plan, Trainer], dict[str, Callback]]


def train(config: RunConfig, extra_callbacks: ExtraCallbacks | None = None) -> Outcome:
    """Run a configuration, resuming from the newest whole checkpoint of its save folder.

    :param extra_callbacks: gives further callbacks, by name, for the trainer.

    :raises UserError: for what cannot work, before any training.
    """
    p = plan(config, device=this_machine())
    check_memory(p)
    try:
        prepare_environment(config.train.seed)
        p = _agreed(p, config)
        with contextlib.ExitStack() as held:
            on_first_rank(lambda: held.enter_context(_run_folder(Path(config.log_folder))))
            if get_rank() != 0:
                set_up_logging(config.log_folder)
            held.enter_context(saving_alone())
            outcome = _train(p, extra_callbacks)
    except (OLMoConfigurationError, OLMoEnvironmentError) as e:
        raise UserError("configuration", "settings that OLMo-core accepts", hint=str(e)) from e
    except (RuntimeError, MemoryError) as e:
        if (short := out_of_memory(p, e)) is not None:
            raise short from None
        if (short := _diverged(e)) is not None:
            raise short from e
        raise
    teardown_training_environment()  # not after an error: NCCL would wait for ranks that wait for this one
    return outcome


def _diverged(error: BaseException) -> UserError | None:
    """The error as one line, if it is about a loss that is not finite."""
    said = str(error.__cause__ or error)  # with several processes a thread of OLMo-core's has found out
    found = re.fullmatch(r"(\S+) loss encountered at step (\d+)", said)
    hint = "a smaller optim.lr or longer optim.warmup_steps may help; checkpoints before that step are kept"
    return found and UserError("training", "a finite loss", f"{found[1]} at step {found[2]}", hint)


def _agreed(p: Plan, config: RunConfig) -> Plan:
    """What was ``auto`` as the process with the least memory has it."""
    if not is_distributed() or p.config == config:
        return p
    chosen: list[Any] = [None] * p.world_size
    dist.all_gather_object(chosen, (p.device.room, p.config))
    return dataclasses.replace(p, config=min(chosen, key=lambda c: c[0])[1])


@contextlib.contextmanager
def _run_folder(folder: Path) -> Iterator[None]:
    """The run's folder with its log, kept to this run. One that was made for a run that is refused does not stay.

    :raises UserError: if another run is in it, or it cannot be written.
    """
    made = not folder.exists()
    with locked(folder, "train.save_folder", "run"):
        set_up_logging(str(folder))
        try:
            yield
        except (OLMoConfigurationError, OLMoEnvironmentError, UserError):
            if made and {path.name for path in folder.iterdir()} <= {LOCK, LOG_FILE}:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _train(p: Plan, extra_callbacks: ExtraCallbacks | None) -> Outcome:
    config = p.config
    clock = ClockCallback()
    checkpoint = on_first_rank(lambda: _choose_checkpoint(p))
    data = prepare_data(p)
    device = get_default_device()
    log.info(
        "%s: %s parameters, %s tokens per step, %d process%s on %s",
        config.name,
        f"{p.transformer.num_counted_params:,}",
        f"{config.train.tokens_per_step:,}",
        p.world_size,
        "" if p.world_size == 1 else "es",
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )
    module = build_train_module(p, device)
    loader = build_data_loader(p, data, module)
    trainer = build_trainer(p, data, module, loader)
    extra = extra_callbacks(p, trainer) if extra_callbacks is not None else {}
    for name, callback in {"clock": clock, **extra}.items():
        trainer.add_callback(name, callback)
    if checkpoint is not None:
        _resume(trainer, checkpoint, config)
    elif config.train.load_path is not None:
        _start_from(config.train.load_path, p, trainer, module)
    done = {"step": trainer.global_step, "tokens": trainer.global_train_tokens_seen, "epoch": trainer.epoch}
    if complete := trainer.max_duration.due(**done):
        log.info("this run is complete at step %d: nothing to do", trainer.global_step)
    else:
        on_first_rank(lambda: write_text(Path(config.log_folder) / "config.yaml", to_yaml(config)))
        on_first_rank(lambda: write_json(Path(config.log_folder) / PLAN_FILE, p.sizes()))
        if not is_url(config.save_folder):  # a remote folder is looked through by OLMo-core itself
            trainer.load_strategy = LoadStrategy.never  # what was to be loaded has been
        trainer.fit()
    warm_up = cast(SpeedCallback, trainer.callbacks["speed"]).warm_up
    on_first_rank(lambda: _summarise(config, trainer.global_step, clock.seconds, warm_up, complete))
    signals = trainer.callbacks["signals"]
    assert isinstance(signals, SignalCallback)
    if signals.received is not None:
        checkpoint = f"{config.save_folder}/step{trainer.global_step}"
        log.info(
            "%s: stopped at step %d of %d, saved in %s", signals.received.name, trainer.global_step, p.steps, checkpoint
        )
    return Outcome(trainer.global_step, signals.received)


def _choose_checkpoint(p: Plan) -> str | None:
    """The checkpoint of this run to resume from, or None. It, or else ``train.load_path``, is checked.

    :raises UserError: for a checkpoint that is not the user's own, is none, or is of another model.
    """
    config = p.config
    checkpoint = find_resumable(config.save_folder)
    if checkpoint is not None:
        check_own(checkpoint)
    source = str(checkpoint) if checkpoint is not None else config.train.load_path
    if source is not None and not is_url(source):
        if not (Path(source) / STATE / ".metadata").is_file():
            raise UserError("train.load_path", f"the folder of a checkpoint (with {STATE}/)", source)
        if checkpoint is not None:
            check_same_run(checkpoint, config)
        else:
            check_same_model(Path(source), config.model, other_reads=config.train.load_other_reads)
        rows = embedding_rows(Path(source))
        if rows not in (None, p.transformer.vocab_size):
            raise UserError(
                "data.tokenizer", f"the one of checkpoint {source}, whose model has {rows:,} rows for tokens",
                f"{p.transformer.vocab_size:,} rows for {p.tokenizer.name}",
                "it has changed: give the former one, or choose another train.save_folder",
            )  # fmt: skip
    return None if checkpoint is None else source


def _resume(trainer: Trainer, checkpoint: str, config: RunConfig) -> None:
    """Resume from a checkpoint of this run, naming changed settings.

    :raises UserError: if the run was begun with other data, or with batches that cannot go on where they ended.
    """
    try:
        trainer.load_checkpoint(checkpoint, load_trainer_state=True, load_optim_state=True)
    except RuntimeError as e:
        if "fingerprint" not in str(e):
            raise
        hint = "choose another train.save_folder, and train.load_path to start from its weights"
        if config.data.mixture is not None:
            hint = f"a mixture is drawn for the length of its run; {hint}"
        expected = f"the data that the run in {config.save_folder} was begun with"
        raise UserError("data", expected, "other data", hint) from None
    loader = trainer.data_loader
    assert isinstance(loader, NumpyDataLoaderBase)
    if loader.tokens_processed % loader.global_batch_size:
        seen = loader.tokens_processed // config.train.sequence_length
        expected = f"a divisor of the {seen} sequences of this epoch that {checkpoint} has seen"
        hint = "otherwise some of them would be read again"
        raise UserError("train.global_batch_size", expected, config.train.global_batch_size, hint)
    log.info("resuming from %s: %d of %d steps are done", checkpoint, trainer.global_step, trainer.max_steps)
    for change in changed_settings(Path(checkpoint), config):
        log.warning("setting changed since the checkpoint: %s", change)


def _start_from(source: str, p: Plan, trainer: Trainer, module: AnyTrainModule) -> None:
    """Load a checkpoint's weights, and nothing else of it, into a run that begins.

    Rank 0 reads them as an evaluation does, and the other ranks get their parts from it; those of a pipeline read for themselves.

    :raises UserError: where they are damaged or not those of the model.
    """
    if is_url(source):
        log.warning("%s is read by OLMo-core, which unpickles its table of contents: use what you trust alone", source)
        trainer.load_checkpoint(source, load_trainer_state=False, load_optim_state=False)
    else:
        weights: dict[str, Any] = {}
        read = functools.partial(
            match_weights, Path(source), p.transformer.build(init_device="meta"),
            other_reads=p.config.train.load_other_reads,
        )  # fmt: skip
        on_first_rank(lambda: weights.update(read()))
        if isinstance(module, PipelineTrainModule):
            module.load_weights(weights or read())
        else:
            # Not strict: of a tied pair only the embedding is there, scores may begin at zero. match_weights compared all names.
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_distributed(), strict=False)
            set_model_state_dict(module.model, weights, options=options)
    log.info("starting from the weights of %s", source)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _summarise(config: RunConfig, steps: int, seconds: float, warm_up: float | None, complete: bool) -> None:
    """Losses and perplexities before and after, time, and where everything is.

    :param warm_up: seconds, of ``seconds``, of compiling and warming up.
    :param complete: the run was complete already. A summary of these steps is then left as it is.
    """
    folder = Path(config.log_folder)
    file = folder / "summary.json"
    before: dict[str, Any] = {}
    if complete:
        with contextlib.suppress(UserError):
            before = read_json(file, "summary")
    if written := before.get("steps") == steps and isinstance(before.get("seconds"), float):
        seconds = before["seconds"]
    metrics = folder / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else []
    ends: dict[str, tuple[float, float | None]] = {}  # None where the last step has no figure: an earlier one is stale
    for key in ["loss", *sorted({k for line in lines for k in line if k.startswith("eval/") and k.endswith("/loss")})]:
        values = {line["step"]: line[key] for line in lines if line.get(key) is not None}
        if values:
            ends[key] = values[min(values)], values.get(steps)
    table = Table(title=f"{config.name}: {steps} steps in {format_duration(seconds)}", title_justify="left")
    for heading in ("validation", "loss before", "after", "perplexity before", "after", "fall"):
        table.add_column(heading, justify="left" if heading == "validation" else "right", no_wrap=True)
    for key, (first, last) in ends.items():
        name = "training batch" if key == "loss" else key.removeprefix("eval/").removesuffix("/loss")
        row = [f"{first:.3f}", "", f"{_perplexity(first):,.1f}", "", ""]
        if last is not None:
            row[1], row[3] = f"{last:.3f}", f"{_perplexity(last):,.1f}"
            row[4] = f"{_perplexity(first - last):,.1f}x"
        table.add_row(name, *row)
    console.print(table)
    console.print(f"config.yaml, train.log, {METRICS_FILE} and summary.json: {folder}", soft_wrap=True, highlight=False)
    console.print(f"checkpoints: {config.save_folder}/step*", soft_wrap=True, highlight=False)
    if not written:
        write_json(file, {"steps": steps, "seconds": seconds, "warm_up_seconds": warm_up, "metrics": ends})
    try:
        write_report([folder], folder)
        console.print(f"{', '.join(FILES)}: {folder}", soft_wrap=True, highlight=False)
    except UserError as e:  # without plotly
        log.info("no report: %s", e)
    except Exception:  # the run is complete whether it can be drawn or not
        log.warning("the report could not be made", exc_info=True)
