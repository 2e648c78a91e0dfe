"""Processes, devices and logging of a training run."""

import logging
import os
import sys
from pathlib import Path

import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train import prepare_training_environment
from rich.console import Console
from rich.logging import RichHandler

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
    # Until the log file is there, its notes would go to the terminal, and its warnings once from every rank.
    quiet.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    prepare_training_environment(seed=seed, backend=backend, shared_filesystem=True)
    quiet.setLevel(level)


class _OursOrWarning(logging.Filter):
    """On the terminal: this project's messages, and everyone's warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in ("moda", "moda_kernels", "moda_evals")


class _FirstRank(logging.Filter):
    """Below errors only rank 0 speaks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or get_rank() == 0


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
    file = logging.FileHandler(Path(folder) / "train.log", encoding="utf-8", delay=rank > 0)
    file.setLevel(logging.WARNING if rank else logging.NOTSET)
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
