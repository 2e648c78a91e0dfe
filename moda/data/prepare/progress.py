"""How far a stage is: input bytes and documents read so far, shown live with the time that is left."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


def format_bytes(n: float) -> str:
    """``1.5 GB`` and the like (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


class Watch:
    """Shows a stage's progress while the body runs: a bar on a terminal, a line now and then elsewhere.

    :param title: what the stage does.
    :param state: the state folder.
    :param stage: the stage's name.
    :param total: input bytes, or None if they are not known: then tasks are counted.
    :param tasks: the stage's tasks.
    """

    def __init__(self, title: str, state: Path, stage: str, total: int | None, tasks: int, console: Console) -> None:
        self.title, self.total, self.tasks, self.console = title, total, tasks, console
        self._notes = state / "progress" / stage
        self._marks = state / "stages" / stage / "completions"
        self._seen: dict[str, tuple[int, int]] = {}
        self._finished: set = set()
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def read(self) -> tuple[int, int, int]:
        """(bytes, documents, finished tasks) so far."""
        finished = {p.name for p in self._marks.iterdir()} if self._marks.is_dir() else set()
        names = list(self._notes.iterdir()) if self._notes.is_dir() else []
        for path in names:
            if path.name in self._finished:
                continue  # its last note has been read
            try:
                size, documents = json.loads(path.read_bytes())
                self._seen[path.name] = (size, documents)
            except (OSError, ValueError):
                continue  # being written
        self._finished = finished
        done = sum(b for b, _ in self._seen.values())
        return done, sum(d for _, d in self._seen.values()), len(finished)

    def _loop(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        clocks = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        figures_column = TextColumn("{task.fields[figures]}")
        on_terminal = self.console.is_terminal
        first, _, first_tasks = self.read()  # of an interrupted run: not part of this one's pace
        last_line = time.monotonic()
        with Progress(*columns, figures_column, *clocks, console=self.console, disable=not on_terminal) as bar:
            task = bar.add_task(self.title, total=self.total or self.tasks, figures="")
            stopping = False
            while not stopping:
                stopping = self._stop.wait(0.5)
                done, documents, tasks = self.read()
                position, total, before = (done, self.total, first) if self.total else (tasks, self.tasks, first_tasks)
                pace = (position - before) / max(time.monotonic() - self._started, 1e-9)
                figures = f"{tasks}/{self.tasks} tasks, {documents:,} documents"
                if self.total:
                    figures += f", {format_bytes(done)} of {format_bytes(self.total)}, {format_bytes(pace)}/s"
                bar.update(task, completed=min(position, total), figures=figures)
                if not on_terminal and not stopping and time.monotonic() - last_line > _LINE_SECONDS:
                    last_line = time.monotonic()
                    left = f"{(total - position) / pace:.0f} s" if pace > 0 else "unknown"
                    self.console.print(f"{self.title}: {figures}, ETA {left}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
