"""How far an evaluation is: a bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .scoring import Progress as Report

__all__ = ["TaskProgress"]

log = logging.getLogger(__name__)

_INTERVAL = 10.0  # seconds between two lines


class TaskProgress:
    """One bar per task.

    :param title: the checkpoint's label.
    :param enabled: False on all ranks but the first.
    """

    def __init__(self, title: str, *, enabled: bool = True, console: Console | None = None) -> None:
        self.title, self.enabled = title, enabled
        console = console or Console(stderr=True)
        self._bars: Progress | None = None
        if enabled and console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> TaskProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def task(self, name: str) -> Iterator[Report]:
        """Report a task's progress through the function that this gives."""
        started = last = time.monotonic()
        bar = None if self._bars is None else self._bars.add_task(f"{self.title}: {name}", total=None)

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if self._bars is not None and bar is not None:
                self._bars.update(bar, completed=done, total=total)
            elif self.enabled and now - last >= _INTERVAL and 0 < done < total:
                last = now
                left = (now - started) * (total - done) / done
                log.info("%s: %s %.0f %%, ETA %d s", self.title, name, 100 * done / total, left)

        yield report
        if self._bars is not None and bar is not None:
            self._bars.update(bar, total=1, completed=1)
        elif self.enabled:
            log.info("%s: %s done in %.1f s", self.title, name, time.monotonic() - started)
