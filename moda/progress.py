"""How far something long is: a bar with an ETA on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn

log = logging.getLogger(__name__)

#: Called with what is done and what there is in all.
Report = Callable[[int, int], None]

_INTERVAL = 10.0  # seconds between two lines


class AboveBars(logging.StreamHandler):
    """Writes to what stderr is at the moment: above the bars while there are some."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class TaskProgress(Progress):
    """One bar per task, described by ``title`` and its name; ``enabled`` is False on all ranks but the first."""

    def __init__(self, title: str, *, enabled: bool = True, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._label, self._lines = title, enabled and not console.is_terminal
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        super().__init__(*columns, console=console, disable=not enabled or self._lines)

    def stop(self) -> None:
        if not self.disable:  # otherwise it would print an empty line
            super().stop()

    @contextmanager
    def measure(self, name: str) -> Iterator[Report]:
        """Report a task's progress through the function that this gives."""
        started = last = time.monotonic()
        bar = self.add_task(escape(f"{self._label}: {name}"), total=None)

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            self.update(bar, completed=done, total=total)
            if self._lines and now - last >= _INTERVAL and 0 < done < total:
                last = now
                left = (now - started) * (total - done) / done
                log.info("%s: %s %.0f %%, ETA %d s", self._label, name, 100 * done / total, left)

        yield report
        self.update(bar, total=1, completed=1)
        if self._lines:
            log.info("%s: %s done in %.1f s", self._label, name, time.monotonic() - started)
