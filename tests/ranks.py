"""Processes that meet through gloo, or NCCL with a GPU each, for tests of one function."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny import PROCESSES

#: Where to run: a CPU, and with two GPUs those.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")],
    ),
]


def _join(rank: int, ranks: int, port: int, out: str, function: Callable[[str], Any], device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://localhost:{port}", rank=rank, world_size=ranks)
    result = function(device)
    if rank == 0:
        torch.save(result, out)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(function: Callable[[str], Any], device: str = "cpu", ranks: int = 2) -> Any:
    """What ``function(device)`` returns on rank 0 of so many ranks."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.pt")
        started = [
            PROCESSES.Process(target=_join, args=(rank, ranks, port, out, function, device)) for rank in range(ranks)
        ]
        for p in started:
            p.start()
        for p in started:
            p.join(120)
            if p.is_alive():
                p.kill()
        assert [p.exitcode for p in started] == [0] * ranks
        return torch.load(out, weights_only=True)
