"""Small callbacks of OLMo-core's trainer: whole checkpoints, what they leave out, signals, time and speed."""

import contextlib
import functools
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import all_reduce_value, barrier, get_rank
from olmo_core.io import is_url
from olmo_core.optim import SkipStepOptimizer
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback, CheckpointerCallback, SpeedMonitorCallback, WandBCallback

from moda.checkpoints import OwnCheckpointer, checkpoints_of_run, remove_old, write_checksums

from .environment import on_first_rank
from .metrics import stable_name
from .plan import wandb_needs_key

log = logging.getLogger(__name__)

_WINDOW_STEPS, _WINDOW_SECONDS = 20, 30.0  # figures of speed are means over the longer of the two


@dataclass
class SealCallback(Callback):
    """Seals every checkpoint with its checksums once OLMo-core and the config saver have written it, and says where it is. Then
    older ones may go.

    :param keep: permanent checkpoints to keep; None for all.
    """

    priority: ClassVar[int] = -100

    keep: int | None = None
    _saved: list[Path] = field(default_factory=list)

    def pre_train(self) -> None:
        if not is_url(folder := self.trainer.save_folder):
            self._saved = on_first_rank(lambda: checkpoints_of_run(Path(folder), self.step))

    def post_checkpoint_saved(self, path: Any) -> None:
        if not is_url(str(path)):
            if not self.trainer.callbacks["checkpointer"].save_async:  # type: ignore[attr-defined]
                barrier()  # every rank's file is in place; asynchronous saves get here from rank 0's last write
                on_first_rank(lambda: self._seal(Path(str(path))))
            elif get_rank() == 0:
                self._seal(Path(str(path)))
        assert isinstance(self.trainer.checkpointer, OwnCheckpointer)
        log.info("saved %s in %.1f s", path, time.monotonic() - self.trainer.checkpointer.began)

    def _seal(self, path: Path) -> None:
        write_checksums(path)
        self._saved = remove_old([*self._saved, path], self.keep)


class SkipStepCallback(Callback):
    """Saves the losses and gradient norms by which a skip-step optimizer judges a step: its own state lacks them."""

    @property
    def _optims(self) -> list[SkipStepOptimizer]:
        """The optimizer, or one for each stage of this rank, which judge alike."""
        module: Any = self.trainer.train_module
        return getattr(module, "optimizers", None) or [module.optim]

    def state_dict(self) -> dict[str, Any]:
        optim = self._optims[0]
        history = {"losses": optim._losses, "grad_norms": optim._grad_norms}
        return {name: torch.stack(seen) if seen else torch.empty(0) for name, seen in history.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        optims = self._optims
        losses, norms = (state_dict[name].to(optims[0].device) for name in ("losses", "grad_norms"))
        clips = self.trainer.train_module.max_grad_norm is not None  # type: ignore[attr-defined]
        if clips != bool(len(norms)):  # the optimizer takes both histories for equally long
            log.warning("optim.max_grad_norm was switched on or off: %s begins a new history", type(optims[0]).__name__)
            return
        for optim in optims:
            for loss in losses:
                optim.latest_loss = loss
            for norm in norms:
                optim.latest_grad_norm = norm


@dataclass
class ClockCallback(Callback):
    """Counts the seconds of a run over its sessions. What a kill has undone is not part of it, in steps as in time."""

    _started: float = field(default_factory=time.monotonic)
    _before: float = 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]


class TimedCheckpointer(CheckpointerCallback):
    """OLMo-core's, whose time is not counted as a training step's."""

    def _save_checkpoint(self, save_async: bool | None = None, ephemeral: bool = False) -> str:
        with between_steps(self.trainer):
            return super()._save_checkpoint(save_async, ephemeral)


@dataclass
class SignalCallback(Callback):
    """Remembers which signal stopped a run. The trainer's own handler still gets it, and ends the run after the step.

    :param received: the signal, on every rank once training has ended.
    """

    priority: ClassVar[int] = 1000

    received: signal.Signals | None = None

    def pre_train(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            # The trainer has just installed its handler, and puts back the one before when it is done.
            signal.signal(number, functools.partial(self._receive, signal.getsignal(number)))

    def _receive(self, handler: Any, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        handler(number, frame)

    def post_train(self) -> None:
        number = all_reduce_value(float(self.received or 0), self.trainer.device, op=dist.ReduceOp.MAX)
        self.received = signal.Signals(int(number)) if number else None


@dataclass
class SpeedCallback(SpeedMonitorCallback):
    """OLMo-core's figures of speed, over the last steps instead of one, without the time between steps.

    The batch before the first step, which compiles, is told apart; the first step, which may still do, is left out.
    """

    pace: float | None = None  # seconds per step
    warm_up: float | None = None  # seconds of the batch before the first step
    _began: float = 0.0
    _ends: deque[float] = field(default_factory=deque)  # of the steps in the window, and of the one before it

    def pre_train(self) -> None:
        super().pre_train()
        self._began = time.perf_counter()  # of all callbacks' this one runs last

    def pre_epoch(self) -> None:
        super().pre_epoch()
        if self.warm_up is None:
            if self.trainer.device.type == "cuda":
                torch.cuda.synchronize(self.trainer.device)
            self.warm_up = time.perf_counter() - self._began
            log.info("compiling and warming up took %.1f s", self.warm_up)

    def leave_out(self, seconds: float) -> None:
        """Do not count the last ``seconds`` as time of a training step."""
        self._ends = deque(end + seconds for end in self._ends)
        self._start_time += seconds

    def post_step(self) -> None:
        now = time.perf_counter()
        self._ends.append(now)
        while len(self._ends) > _WINDOW_STEPS + 1 and now - self._ends[1] >= _WINDOW_SECONDS:
            self._ends.popleft()
        if len(self._ends) > 1:
            self.pace = (now - self._ends[0]) / (len(self._ends) - 1)
            self._step_last_logged = now - self.pace  # from which OLMo-core takes the step's time
        super().post_step()


@contextlib.contextmanager
def between_steps(trainer: Trainer) -> Iterator[None]:
    """What the block does, an evaluation or a checkpoint, is not counted as time of a training step."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    began = time.perf_counter()
    yield
    speed = trainer.callbacks["speed"]
    assert isinstance(speed, SpeedCallback)
    speed.leave_out(time.perf_counter() - began)


@dataclass
class WandB(WandBCallback):
    """OLMo-core's callback, with the names of metrics.jsonl for the figures that are there."""

    def pre_train(self) -> None:
        if not wandb_needs_key():
            os.environ.setdefault("WANDB_API_KEY", "0" * 40)  # OLMo-core asks for one in any mode
        super().pre_train()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        super().log_metrics(step, {stable_name(name) or name: value for name, value in metrics.items()})
