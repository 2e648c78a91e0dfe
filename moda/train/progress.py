"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere and in the log file."""

import logging
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import ConsoleLoggerCallback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from .callbacks import SpeedCallback
from .environment import console, on_first_rank
from .metrics import MetricsFile, select

log = logging.getLogger(__name__)
_INTERVAL = 10.0  # seconds between two lines about something else than steps

#: Figures of a step in the order in which a line shows them.
_FORMATS = {
    "loss": "loss {:.4f}", "lr": "lr {:.2e}", "grad_norm": "grad norm {:.3f}", "tokens_per_second": "{:,.0f} tokens/s",
    "mfu_percent": "MFU {:.1f} %", "memory_gib": "memory {:.1f} GiB",
}  # fmt: skip


def format_duration(seconds: float) -> str:
    """``1d 02:03:04``, ``02:03:04`` or ``03:04``."""
    s = int(seconds + 0.5)
    days, hours, minutes, s = s // 86400, s // 3600 % 24, s // 60 % 60, s % 60
    clock = f"{hours:02d}:{minutes:02d}:{s:02d}" if hours or days else f"{minutes:02d}:{s:02d}"
    return f"{days}d {clock}" if days else clock


def step_line(step: int, total: int, f: dict[str, float]) -> str:
    """One line of figures: step, loss, lr, gradient norm, tokens/s, MFU, memory, ETA."""
    parts = [f"step {step}/{total}", *(form.format(f[name]) for name, form in _FORMATS.items() if name in f)]
    if "eta_seconds" in f:
        parts.append(f"ETA {format_duration(f['eta_seconds'])}")
    return " | ".join(parts)


class _ETA(ProgressColumn):
    """Counts down to the moment at which the run ends at its present pace."""

    def render(self, task: Task) -> Text:
        end = task.fields["end"]
        return Text("" if end is None else f"ETA {format_duration(max(0.0, end - time.monotonic()))}")


@dataclass
class ProgressCallback(ConsoleLoggerCallback):
    """Shows, logs and writes the figures of a run.

    :param devices: ranks that train.
    """

    devices: int = 1
    folder: str = ""
    total_steps: int = 0
    _file: Any = None
    _shown: dict[str, float] = field(default_factory=dict)
    _bar: Any = None
    _task: Any = None
    _figures: str = ""
    _spoke: float = 0.0

    def pre_train(self) -> None:
        self.total_steps = self.trainer.max_steps or 0
        self._file = MetricsFile(self.folder)
        on_first_rank(lambda: self._file.rewind(self.step if self.trainer.checkpoint_loaded else -1))
        self._spoke = time.monotonic()
        if get_rank() != 0:
            return
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                _ETA(Column(no_wrap=True)),
                TextColumn("{task.fields[figures]}", markup=False),
                console=console,
            )
            begun = {"completed": self.step, "figures": "", "end": None}
            self._task = self._bar.add_task("training", total=self.total_steps, **begun)
            self._bar.start()

    def post_step(self) -> None:
        if self.trainer.device.type == "cpu":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.trainer.record_metric("system/memory_gib", peak * (1 if sys.platform == "darwin" else 1024) / 2**30)
        if self._bar is not None:
            eta = self._eta(self.step)
            end = None if eta is None else time.monotonic() + eta
            self._bar.update(self._task, completed=self.step, end=end, figures=self._figures)

    def busy(self, what: str, done: int, total: int) -> None:
        """Show how far something between two steps is: on the bar, or in a line now and then."""
        if self._bar is not None:
            self._bar.update(self._task, figures=f"{what}: {done}/{total}")
        elif time.monotonic() - self._spoke > _INTERVAL:
            self._spoke = time.monotonic()
            log.info("step %d | %s: %d of %d batches", self.step, what, done, total)

    def _eta(self, step: int) -> float | None:
        """Seconds that the remaining steps take at the pace of the last ones."""
        speed = self.trainer.callbacks["speed"]
        assert isinstance(speed, SpeedCallback)
        return None if speed.pace is None else speed.pace * (self.total_steps - step)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if get_rank() != 0:
            return
        figures = select(metrics)
        per_device = figures.pop("tokens_per_second_per_device", None)
        if per_device is not None:
            figures["tokens_per_second"] = per_device * self.devices
        eta = self._eta(step) if "loss" in figures else None
        if eta is not None:
            figures["eta_seconds"] = eta
        if not figures:
            return
        self._file.add(step, figures)
        for name in ("tokens_per_second", "mfu_percent", "memory_gib"):  # at a checkpoint these come after the loss
            if name in figures:
                self._shown[name] = figures[name]
        evaluations = {k: v for k, v in figures.items() if k.startswith("eval/") and k.endswith("/loss")}
        for name, loss in sorted(evaluations.items()):
            perplexity = figures.get(name.replace("/loss", "/perplexity"), float("nan"))
            log.info("step %d | %s %.4f | perplexity %.2f", step, name, loss, perplexity)
        if "loss" in figures and self._should_log_metrics(step):
            line = step_line(step, self.total_steps, {**self._shown, **figures})
            log.info(line)
            self._spoke = time.monotonic()
            if self._bar is not None:
                self._figures = " | ".join(
                    line.split(" | ")[1 : None if eta is None else -1]
                )  # the ETA has its own column
                self._bar.update(self._task, figures=self._figures)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
