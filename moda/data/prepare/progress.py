"""How far a stage is: input bytes and documents read so far, shown live with the time that is left."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


class Watch:
    """Shows a stage's progress while the body runs: a bar on a terminal, a line now and then elsewhere.

    :param total: input bytes, or None if they are not known: then tasks are counted.
    """

    def __init__(self, title: str, state: Path, stage: str, total: int | None, tasks: int, console: Console) -> None:
        self.title, self.total, self.tasks, self.console = title, total, tasks, console
        self._notes = state / "progress" / stage
        self._marks = state / "stages" / stage / "completions"
        self._seen: dict[str, tuple[int, int]] = {}
        self._finished: set[str] = set()
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def read(self) -> tuple[int, int, int]:
        """(bytes, documents, finished tasks) so far."""
        finished = {p.name for p in self._marks.glob("*")}
        for path in self._notes.glob("*"):
            if path.name not in self._finished:  # otherwise its last note has been read
                with contextlib.suppress(OSError, ValueError):  # being written
                    size, documents = json.loads(path.read_bytes())
                    self._seen[path.name] = (size, documents)
        self._finished = finished
        return sum(b for b, _ in self._seen.values()), sum(d for _, d in self._seen.values()), len(finished)

    def _loop(self) -> None:
        texts = ("{task.description}", "{task.percentage:>3.0f} %", "{task.fields[figures]}", "ETA")
        title, percentage, figures_column, eta = map(TextColumn, texts)
        columns = (title, BarColumn(), percentage, figures_column, TimeElapsedColumn(), eta, TimeRemainingColumn())
        on_terminal = self.console.is_terminal
        first, _, first_tasks = self.read()  # of an interrupted run: not part of this one's pace
        last_line = time.monotonic()
        with Progress(*columns, console=self.console, disable=not on_terminal) as bar:
            task = bar.add_task(self.title, total=self.total or self.tasks, figures="")
            stopping = False
            while not stopping:
                stopping = self._stop.wait(0.5)
                done, documents, tasks = self.read()
                position, total, before = (done, self.total, first) if self.total else (tasks, self.tasks, first_tasks)
                pace = (position - before) / max(time.monotonic() - self._started, 1e-9)
                figures = f"{tasks}/{self.tasks} tasks, {documents:,} documents"
                if self.total:
                    figures += f", {decimal(done)} of {decimal(self.total)}, {decimal(int(pace))}/s"
                bar.update(task, completed=min(position, total), figures=figures)
                if not on_terminal and not stopping and time.monotonic() - last_line > _LINE_SECONDS:
                    last_line = time.monotonic()
                    left = f"{(total - position) / pace:.0f} s" if pace > 0 else "unknown"
                    self.console.print(f"{self.title}: {figures}, ETA {left}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
