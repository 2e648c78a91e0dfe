"""Processes, devices and logging of a training run."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from olmo_core.distributed.utils import broadcast_object, get_rank
from olmo_core.train import prepare_training_environment
from rich.console import Console
from rich.logging import RichHandler

from moda.errors import UserError

T = TypeVar("T")

LOG_FILE = "train.log"

#: The one console of the process: the progress bar and log lines share it.
console = Console()


def launched_world_size() -> int:
    """How many processes the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare_environment(seed: int) -> None:
    """Join the other processes, choose the device, seed.

    On a GPU a plain ``python`` run becomes a process group of one, so that it trains with the same FSDP2 mixed precision as
    many ranks do. On a CPU it stays a single process without a group.
    """
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torch.cuda.is_available():
        backend: str | None = "cpu:gloo,cuda:nccl"
    else:
        backend = "cpu:gloo" if distributed else None
    quiet = logging.getLogger("olmo_core")
    level = quiet.level
    quiet.setLevel(logging.WARNING)  # until the log file is there, its notes would go to the terminal
    prepare_training_environment(seed=seed, backend=backend, shared_filesystem=True)
    quiet.setLevel(level)


def on_first_rank(work: Callable[[], T], key: str = "train.save_folder") -> T:
    """What ``work`` returns on rank 0, on every rank, which must all call this.

    :param work: returns something small that can be sent to the other ranks.
    :param key: what a file that cannot be read or written is about.

    :raises UserError: on every rank, where ``work`` raises one or an OSError. After anything else the others exit without a word.
    """
    result: T | None = None
    error: BaseException | None = None
    if get_rank() == 0:
        try:
            result = work()
        except OSError as e:
            error = UserError(key, "files that can be read and written", e.filename, e.strerror)
        except BaseException as e:
            error = e
    sent = error if error is None or isinstance(error, UserError) else SystemExit(1)
    result, sent = broadcast_object((result, sent))
    if error is not None:
        raise error
    if sent is not None:
        raise sent
    return result  # type: ignore[return-value]


class _OursOrWarning(logging.Filter):
    """On the terminal: this project's messages, and everyone's warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("moda", "moda_kernels", "moda_evals")


class _FirstRank(logging.Filter):
    """Below warnings only rank 0 speaks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or get_rank() == 0


def set_up_logging(folder: str) -> None:
    """Messages on the terminal (or plain lines where there is none), and everything in ``<folder>/train.log``."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.INFO)
    screen: logging.Handler
    if console.is_terminal:
        screen = RichHandler(console=console, show_path=False, show_level=False, omit_repeated_times=False)
        screen.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    screen.addFilter(_OursOrWarning())
    screen.addFilter(_FirstRank())
    root.addHandler(screen)
    if get_rank() == 0:
        file = logging.FileHandler(Path(folder) / LOG_FILE)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)
