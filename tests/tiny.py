"""A tiny run for tests: real text from Python's own library, a small tokenizer, a model that takes milliseconds per step."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pydoc_data.topics
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12


def make_tokenizer(path: Path, size: int = 320, special: str = "<|endoftext|>") -> Path:
    """Train a byte-level BPE tokenizer of ``size`` tokens and save it as ``path``."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tok.save(str(path))
    return path


def make_text(folder: Path, documents: int = 12) -> Path:
    """A folder of text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in list(pydoc_data.topics.topics.items())[:documents]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(text)
    return folder


def tiny_config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a tiny MoDA run below ``folder``; ``sections`` override keys section by section."""
    config: dict[str, Any] = {
        "name": "tiny",
        "model": dict(
            d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_hidden_size=48, norm_placement="post",
            depth=dict(mechanism="moda", attention="reuse", ffn=True),
        ),
        "data": dict(
            text=[str(folder / "text")], tokenizer=str(folder / "tokenizer.json"), work_dir=str(folder / "work"),
            validation_fraction=0.2,
        ),
        "optim": dict(lr=3e-3, warmup_steps=2),
        "train": dict(
            sequence_length=32, global_batch_size=4, microbatch_size=2, max_steps=STEPS,
            save_folder=str(folder / "run"),
        ),
        "eval": dict(interval=None, on_start=False, on_finish=False, max_batches=2),
        "checkpoint": dict(interval=4),
        "logging": dict(interval=1),
    }  # fmt: skip
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a tiny configuration with its text and tokenizer and return the YAML file."""
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(folder / "tokenizer.json")
        make_text(folder / "text")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder, **sections)))
    return path


def command(config: Path, *overrides: str, processes: int | None = None) -> list[str]:
    """The command line of a training run, as a user types it."""
    script = [str(ROOT / "scripts" / "train.py"), str(config), *overrides]
    if processes is None:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *script]


def environment() -> dict[str, str]:
    """This process's environment, in which the packages of this clone are imported."""
    folders = [ROOT, *(ROOT / name for name in ("kernels", "evals", "scripts"))]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}


#: Starts processes that have imported everything already, which takes most of the time of a run this small. A fork of a process
#: that has looked for GPUs cannot use them.
PROCESSES: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PROCESSES.set_forkserver_preload(["moda.train.run", "moda_evals.in_loop", "matplotlib.backends.backend_agg"])


def _train(arguments: list[str], variables: dict[str, str], printed: tuple[str, str]) -> None:
    os.environ.update(variables)
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    from moda_cli import main

    code = main(["train", *arguments])
    sys.stdout.flush()
    raise SystemExit(code)


def run(config: Path, *overrides: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run training to its end and return what it printed, as :func:`command` would have.

    :param processes: join so many, as torchrun does; like it, all end if one fails.
    """
    arguments = [str(config), *overrides]
    started = []
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    joined = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with tempfile.TemporaryDirectory() as folder:
        printed = str(Path(folder) / "stdout"), str(Path(folder) / "stderr")
        for rank in map(str, range(processes or 1)):
            variables = {} if processes is None else {**joined, "RANK": rank, "LOCAL_RANK": rank}
            started.append(PROCESSES.Process(target=_train, args=(arguments, variables, printed)))
            started[-1].start()
        deadline = time.monotonic() + 300
        while alive := [p for p in started if p.is_alive()]:
            multiprocessing.connection.wait([p.sentinel for p in alive], timeout=1)
            if any(p.exitcode for p in started):
                deadline = min(deadline, time.monotonic() + 20)  # the others may still have something to say
            if time.monotonic() > deadline:
                for p in alive:
                    p.kill()
        code = next((p.exitcode for p in started if p.exitcode), 0)
        out, err = (Path(path).read_text() if Path(path).exists() else "" for path in printed)
    return subprocess.CompletedProcess(arguments, code, out, err)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint."""
    from olmo_core.distributed.checkpoint import load_keys
    from torch.distributed.checkpoint import FileSystemReader

    folder = checkpoint / "model_and_optim"
    names = [n for n in FileSystemReader(str(folder)).read_metadata().state_dict_metadata if n.startswith("model.")]
    return dict(zip(names, load_keys(str(folder), names)))
