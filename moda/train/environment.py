"""Processes, devices and logging of a training run."""

import logging
import os
import re
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
console = Console(markup=False)  # messages hold what users wrote


def launched_world_size() -> int:
    """How many processes the launcher started (1 without a launcher).

    :raises UserError: for variables of a launcher that are no numbers, or contradict each other.
    """
    numbers = {}
    for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        given = os.environ.get(name, str(default))
        least = 1 if name.endswith("SIZE") else 0
        if not (re.fullmatch("[0-9]{1,9}", given) and int(given) >= least):
            raise UserError(f"the variable {name}", f"an integer >= {least}", given, "torchrun sets it")
        numbers[name] = int(given)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in os.environ and size in os.environ and numbers[rank] >= numbers[size]:
            raise UserError(
                f"the variable {rank}", f"less than {size} ({numbers[size]})", numbers[rank], "torchrun sets both"
            )
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if numbers["WORLD_SIZE"] > 1 and "RANK" in os.environ and missing:
        raise UserError(f"the variable {missing[0]}", "a value beside RANK", hint="torchrun sets it")
    return numbers["WORLD_SIZE"]


def prepare_environment(seed: int) -> None:
    """Join the other processes if there are any, choose the device, seed."""
    backend = None
    if launched_world_size() > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo"
    few_threads = torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ  # OLMo-core sets it
    quiet = logging.getLogger("olmo_core")
    level = quiet.level
    # Until the log file is there, its notes would go to the terminal, and its warnings once from every rank.
    quiet.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    prepare_training_environment(seed=seed, backend=backend, shared_filesystem=True)
    if few_threads:
        torch.set_num_threads(1)  # the host only feeds the GPU: waking threads takes longer than its small operations
    torch.set_default_device(None)  # without a group OLMo-core makes it the GPU, for every tensor of every library
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
    """On the terminal: this project's messages, and everyone's warnings. How a run failed is said once, at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "olmo_core.train.trainer" and record.getMessage().startswith("Training failed"):
            return False
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("moda", "moda_kernels", "moda_evals")


class _FirstRank(logging.Filter):
    """Below errors only rank 0 speaks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or get_rank() == 0


class _LogFile(logging.FileHandler):
    """The log file. A full disk is reported once, by what fails for it, and not at every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def set_up_logging(folder: str) -> None:
    """Messages on the terminal (or plain lines where there is none), and everything in ``<folder>/train.log``.

    Of the ranks after the first the terminal shows errors, and the file has warnings too.
    """
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
    rank = get_rank()
    file = _LogFile(Path(folder) / LOG_FILE, encoding="utf-8", delay=rank > 0)
    file.setLevel(logging.WARNING if rank else logging.NOTSET)
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
