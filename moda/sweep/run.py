"""Running a sweep on this machine: several runs at a time, each a process group of its own.

What is finished is skipped, what is not is resumed, a run that fails is reported and the others go on. Every run prints into
``logs/NAME.log`` of the sweep's folder.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from moda.files import locked

from .spec import Cell
from .state import State, check_folder, state_of

#: Seconds between two looks at the running processes, and at their figures.
_POLL, _REFRESH = 0.5, 5.0


@dataclass(frozen=True)
class Worker:
    """What one run gets.

    :param gpus: the GPUs it sees (``CUDA_VISIBLE_DEVICES``), or None where there are none.
    :param processes: processes of the run; one per GPU.
    """

    gpus: tuple[str, ...] | None = None
    processes: int = 1


def workers(gpus: Sequence[str], jobs: int, gpus_per_run: int) -> list[Worker]:
    """A worker for every group of GPUs and every run that shares it; without GPUs ``jobs`` of them.

    :param jobs: runs at a time on the same GPUs, or on the CPU.
    """
    if not gpus:
        return [Worker()] * jobs
    groups = [tuple(gpus[i : i + gpus_per_run]) for i in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)]
    return [Worker(group, gpus_per_run) for _ in range(jobs) for group in groups]


def command(cell: Cell, processes: int = 1) -> list[str]:
    """The command line of a run."""
    train = ["moda_cli", "train", str(cell.file), *cell.overrides]
    if processes == 1:
        return [sys.executable, "-m", *train]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", *torchrun, "-m", *train]


@dataclass
class Running:
    """A process that trains a cell."""

    cell: Cell
    worker: Worker
    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)


@dataclass
class Board:
    """How all runs stand: what a live table shows. :param notes: the last message of a run that failed."""

    cells: Sequence[Cell]
    states: dict[str, State]
    running: dict[str, Running] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        return list(self.notes)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no message"])[-1].removeprefix("error: ")


def end_with_parent() -> None:
    """In a child process on Linux: get SIGTERM when the process that started it is killed. A run then saves and stops."""
    with contextlib.suppress(AttributeError, OSError):  # no prctl elsewhere
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _start(cell: Cell, worker: Worker, logs: Path) -> Running:
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{cell.name}.log"
    environment = dict(os.environ)
    if worker.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(worker.gpus)
    output: IO[bytes]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(cell, worker.processes), stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which asks its runs to save and stop
            preexec_fn=end_with_parent,
        )  # fmt: skip
    return Running(cell, worker, process, log)


def _works(worker: Worker) -> bool:
    """Whether a worker's GPUs still answer."""
    if worker.gpus is None:
        return True
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(worker.gpus)}
    probe = "import torch\nfor i in range(torch.cuda.device_count() or 1): torch.zeros(1, device=f'cuda:{i}').item()"
    try:
        done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:  # it hangs
        return False
    return done.returncode == 0


@contextlib.contextmanager
def _stopping(running: dict[str, Running]) -> Iterator[None]:
    """On an interruption or SIGTERM ask the runs to save and stop, and wait for them."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException:
        for run in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGTERM)
        for run in running.values():
            run.process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def run_sweep(cells: Sequence[Cell], logs: Path, available: Sequence[Worker], show: Callable[[Board], None]) -> Board:
    """Run what is not finished.

    :param available: what runs can get; each has one run at a time.
    :param show: called at every look.

    :raises UserError: where a run's folder holds another run, or another sweep runs it; nothing has been started then.
    """
    for cell in cells:
        check_folder(cell)
    board = Board(cells, {cell.name: state_of(cell) for cell in cells})
    refreshed = time.monotonic()
    waiting = [cell for cell in cells if board.states[cell.name].kind != "finished"]
    free = list(available)
    with contextlib.ExitStack() as held:
        for cell in waiting:  # each of its own: what another process has with --only does not matter
            held.enter_context(locked(logs / f".{cell.name}", f"run {cell.name}", "sweep"))
        held.enter_context(_stopping(board.running))
        while waiting and (free or board.running) or board.running:
            while waiting and free:
                run = _start(waiting.pop(0), free.pop(0), logs)
                board.running[run.cell.name] = run
            show(board)
            time.sleep(_POLL)
            due = time.monotonic() - refreshed > _REFRESH
            refreshed = time.monotonic() if due else refreshed
            for name, run in list(board.running.items()):
                code = run.process.poll()
                if code is not None or due:
                    board.states[name] = state_of(run.cell)
                if code is None:
                    continue
                del board.running[name]
                if code == 0 and board.states[name].kind == "finished":
                    free.append(run.worker)
                elif _works(run.worker):
                    board.notes[name] = f"{_last_line(run.log)} (exit code {code}, {run.log})"
                    free.append(run.worker)
                else:  # the GPU is gone, not the run: another worker resumes it
                    waiting.insert(0, run.cell)
    for cell in waiting:
        board.notes[cell.name] = "no GPU is left that answers"
    show(board)
    return board
