"""A tiny run for tests: real text from Python's own library, a small tokenizer, a model that takes milliseconds per step."""

from __future__ import annotations

import os
import pydoc_data.topics
import subprocess
import sys
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


def run(config: Path, *overrides: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run training to its end and return what it printed."""
    line = command(config, *overrides, processes=processes)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint."""
    from olmo_core.distributed.checkpoint import load_keys
    from torch.distributed.checkpoint import FileSystemReader

    folder = checkpoint / "model_and_optim"
    names = [n for n in FileSystemReader(str(folder)).read_metadata().state_dict_metadata if n.startswith("model.")]
    return dict(zip(names, load_keys(str(folder), names)))
