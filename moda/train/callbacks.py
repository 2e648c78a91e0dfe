"""Small callbacks of OLMo-core's trainer: checksums, signals, speed."""

import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from olmo_core.distributed.utils import all_reduce_value, barrier, get_fs_local_rank, get_rank
from olmo_core.io import is_url
from olmo_core.train.callbacks import Callback, SpeedMonitorCallback, WandBCallback

from moda.checkpoints import write_checksums

from .metrics import stable_name
from .plan import wandb_needs_key


class ChecksumCallback(Callback):
    """Seals every checkpoint with its checksums once OLMo-core and the config saver have written it."""

    priority: ClassVar[int] = -100

    def post_checkpoint_saved(self, path: Any) -> None:
        if is_url(str(path)):
            return
        if not self.trainer.callbacks["checkpointer"].save_async:  # type: ignore[attr-defined]
            barrier()  # every rank's file is in place; asynchronous saves get here from rank 0's last write
        if get_rank() == 0 and get_fs_local_rank() == 0:
            write_checksums(Path(str(path)))


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


class SpeedCallback(SpeedMonitorCallback):
    """OLMo-core's figures of speed, without the time that evaluations take."""

    def leave_out(self, seconds: float) -> None:
        """Do not count the last ``seconds`` as time of a training step."""
        self._step_last_logged += seconds
        self._start_time += seconds


@dataclass
class WandB(WandBCallback):
    """OLMo-core's callback, with the names of metrics.jsonl for the figures that are there."""

    def pre_train(self) -> None:
        if not wandb_needs_key():
            os.environ.setdefault("WANDB_API_KEY", "0" * 40)  # OLMo-core asks for one in any mode
        super().pre_train()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        super().log_metrics(step, {stable_name(name) or name: value for name, value in metrics.items()})
