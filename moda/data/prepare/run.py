"""A preparation from its options to the finished folder: plan, lock, stages, shards, manifest, rename."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from moda.data.manifest import MANIFEST, read_manifest
from moda.data.token_files import token_dtype
from moda.data.tokenizer import Tokenizer, load_tokenizer
from moda.errors import UserError
from moda.files import LOCK, locked, read_json, write_json
from moda.typed import to_dict

from . import dedup
from .executors import disk_full, make_executor, raise_errors, run_stage, start_ray
from .options import ExecutorKind, PrepareOptions
from .progress import Watch
from .steps import SPLITS, PartTokenizer, ShardWriter, TaskReader, plan_shards
from .tasks import STATE, Task, make_tasks, read_state, state_file, write_task

log = logging.getLogger(__name__)

FORMAT = 2  # of the output; part of the manifest
_NOT_IN_RESULT = ("output", "executor", "workers", "ray_address", "slurm")
_POLL_SECONDS = 2.0
_PACKED_BYTES = 256 << 20  # of shards that one process has written before another has started


@dataclass(frozen=True)
class Preparation:
    """A finished preparation.

    :param folder: where it is.
    :param manifest: its manifest.
    :param seconds: how long this call worked on it; 0 if it was there already.
    """

    folder: Path
    manifest: dict[str, Any]
    seconds: float


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keep a second preparation out of a folder, and say so where the disk is full."""
    with locked(partial, "output", "preparation"):
        try:
            yield
        except OSError as e:
            raise disk_full(e, partial) or e from None


def _plan(options: PrepareOptions, tokenizer: Tokenizer, tasks: list[Task], inputs: dict[str, Any]) -> dict[str, Any]:
    """What identifies a preparation: the same plan gives the same bytes. Its options are part of the manifest."""
    pieces = [p for task in tasks for p in task.pieces]
    stamps = {p.path: os.stat(p.path).st_mtime_ns if os.path.isfile(p.path) else None for p in pieces}
    files = [[p.format, p.path, p.start, p.end, p.size, stamps[p.path]] for p in pieces]
    return {
        "format": FORMAT,
        "options": {k: v for k, v in to_dict(options).items() if k not in _NOT_IN_RESULT},
        "tokenizer": tokenizer.describe(),
        "tasks": len(tasks),
        "inputs": inputs,
        "pieces": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
    }


def _open_plan(state: Path, plan: dict[str, Any], tasks: list[Task]) -> None:
    """Start a preparation, or check that the one that was interrupted is this one."""
    file = state / "plan.json"
    if file.is_file():
        before = read_json(file, "output")
        if changed := [name for name, value in plan.items() if before.get(name) != value]:
            what = "input files" if changed[0] in ("pieces", "inputs", "tasks") else changed[0]
            hint = "resume it with what it was begun with, or pass --restart"
            raise UserError("output", f"the same {what} as the unfinished preparation in {state.parent}", hint=hint)
        log.info("resuming the unfinished preparation in %s", state.parent)
    else:
        for rank, task in enumerate(tasks):
            write_task(state, rank, task)
        write_json(file, plan)
    shutil.rmtree(state / "errors", ignore_errors=True)
    for scratch in state.parent.rglob(".*.partial"):
        scratch.unlink(missing_ok=True)


class _Stages:
    """Runs the stages of a preparation."""

    def __init__(self, options: PrepareOptions, state: Path, console: Console) -> None:
        self.options, self.state, self.console = options, state, console
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = options.workers or (16 if options.executor == ExecutorKind.slurm else cores)
        if options.executor == ExecutorKind.ray:
            start_ray(options.ray_address)

    def run(
        self, title: str, stage: str, pipeline: list[PipelineStep], tasks: int, *, total: int | None = None,
        workers: int | None = None, is_whole: Callable[[int], bool] = lambda rank: True,
    ) -> None:  # fmt: skip
        """Run a stage until all its tasks are complete.

        :param total: input bytes, where the stage reads the input.
        :param workers: fewer workers than configured, for a stage too small to start them.
        :param is_whole: whether the files of a finished task are there; those of which they are not run again.

        :raises UserError: with the reason if one fails.
        """
        for rank in range(tasks):
            mark = self.state / "stages" / stage / "completions" / f"{rank:05d}"
            if mark.is_file() and not is_whole(rank):
                mark.unlink()
        most = min(self.workers, workers or self.workers)
        executor = make_executor(self.options, pipeline, tasks, state=str(self.state), stage=stage, workers=most)
        if not executor.get_incomplete_ranks():
            return
        with Watch(title, self.state, stage, total, tasks, self.console):
            run_stage(executor)
            while left := executor.get_incomplete_ranks():  # Slurm's executor returns when it has submitted
                raise_errors(str(self.state))
                if self.options.executor != ExecutorKind.slurm:
                    hint = f"see {self.state / 'stages' / stage / 'logs'}"
                    raise UserError("executor", f"all tasks of {stage} to succeed", f"{len(left)} did not", hint)
                time.sleep(_POLL_SECONDS)


def _tokenize(stages: _Stages, tokenizer: Tokenizer, tasks: list[Task], dtype: np.dtype) -> None:
    """Everything up to the parts."""
    options, state, parts = stages.options, str(stages.state), stages.state / "parts"
    total = sum(t.size for t in tasks) or None
    before, filters = dedup.stages(options, state, len(tasks))
    for name, pipeline, count in before:
        stages.run(f"duplicates: {name}", name, pipeline, count, total=total if name == "hash" else None)

    def is_whole(rank: int) -> bool:
        """Whether a part's files are there with the sizes that it noted."""
        try:
            part = read_state(state, "parts", rank)
            sizes = {s: [(parts / f"{rank:05d}.{s}.{k}").stat().st_size for k in ("tokens", "ends")] for s in SPLITS}
        except (OSError, UserError):
            return False
        return all(sizes[s] == [part[s]["tokens"] * dtype.itemsize, part[s]["documents"] * 8] for s in SPLITS)

    step = PartTokenizer(
        state, tokenizer.location, vocab_size=tokenizer.config.vocab_size, eos_token_id=tokenizer.config.eos_token_id,
        dtype=dtype.name, validation_fraction=options.validation_fraction,
    )  # fmt: skip
    pipeline = [TaskReader(state, "tokenize"), *filters, step]
    stages.run("tokenizing", "tokenize", pipeline, len(tasks), total=total, is_whole=is_whole)


def _pack(stages: _Stages, tasks: list[Task], dtype: np.dtype) -> list[dict[str, Any]]:
    """Shards of all sources, written and hashed; what each holds, in order."""
    state, root = stages.state, stages.state.parent
    plans: list[dict[str, Any]] = []
    for name in stages.options.sources:
        ranks = [r for r, t in enumerate(tasks) if t.source == name]
        for split in SPLITS:
            for i, shard in enumerate(plan_shards(state / "parts", ranks, split, stages.options.shard_tokens)):
                plans.append({"file": f"{split}/{name}-{i:05d}.npy", "source": name, "split": split, **shard})
    if not any(p["split"] == "train" for p in plans):
        raise UserError("sources", "at least one document that is not empty")
    for rank, shard in enumerate(plans):
        write_json(state_file(state, "pack", rank), shard)

    def is_whole(rank: int) -> bool:
        note, file = state_file(state, "packed", rank), root / plans[rank]["file"]
        return note.is_file() and file.is_file() and file.stat().st_size == read_json(note, "output")["bytes"]

    few = 1 + sum(p["tokens"] for p in plans) * dtype.itemsize // _PACKED_BYTES
    writer = ShardWriter(str(root), str(state), dtype.name)
    stages.run("writing shards", "pack", [writer], len(plans), workers=few, is_whole=is_whole)
    return [read_state(state, "packed", rank) for rank in range(len(plans))]


def _source_summary(state: Path, tasks: list[Task], name: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's entry of a source: documents, tokens, bytes, hash, and what was left out."""
    counts: Counter[str] = Counter()
    splits: dict[str, Counter[str]] = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    for rank, task in enumerate(tasks):
        if task.source == name:
            counts.update(read_state(state, "reads", rank))
            part = read_state(state, "parts", rank)
            for split in SPLITS:
                splits[split].update(part[split])
    total = {k: sum(splits[s][k] for s in SPLITS) for k in ("documents", "tokens", "bytes")}
    duplicates = counts.pop("documents", 0) - total["documents"]
    digest = hashlib.sha256("".join(s["sha256"] for s in shards if s["source"] == name).encode()).hexdigest()
    return {
        **total, **{s: dict(c) for s, c in splits.items()}, "duplicates": duplicates,
        "skipped": dict(sorted(counts.items())), "sha256": digest,
    }  # fmt: skip


def _finish(partial: Path, out: Path) -> None:
    """Turn the folder of an unfinished preparation into the output; one that is being replaced goes last."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    for path in (old, out / STATE):
        shutil.rmtree(path, ignore_errors=True)
    (out / LOCK).unlink(missing_ok=True)


def prepare(
    options: PrepareOptions, *, restart: bool = False, overwrite: bool = False, console: Console | None = None
) -> Preparation:
    """Tokenize text into shards with a manifest.

    The output depends on the inputs and on the options that the manifest holds, and on nothing else. An interrupted
    preparation resumes where it was when it is called again.

    :param restart: throw away an unfinished preparation of the same output.
    :param overwrite: replace a finished output, when the new one is complete.

    :raises UserError: naming what is wrong; a finished output is untouched.
    """
    console = console or Console(markup=False)
    started = time.monotonic()
    assert not isinstance(options.tokenizer, str)
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.load()  # now, rather than in every worker
    dtype = token_dtype(tokenizer.config.vocab_size)
    out = options.root
    if out.exists() and not (out / MANIFEST).is_file():  # never to be replaced, whatever was asked
        raise UserError("output", "a folder that does not exist, or one that was prepared here", str(out))
    tasks, inputs = make_tasks(options)
    plan = _plan(options, tokenizer, tasks, inputs)
    if out.exists() and not overwrite:
        return _already_there(out, plan)
    partial = out.with_name(out.name + ".partial")
    with _locked(partial):
        if out.exists() and not overwrite:  # another process finished it in between
            shutil.rmtree(partial, ignore_errors=True)  # renamed by that process, if we opened the lock before
            return _already_there(out, plan)
        if restart:
            for path in partial.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        state = partial / STATE
        _open_plan(state, plan, tasks)
        stages = _Stages(options, state, console)
        _tokenize(stages, tokenizer, tasks, dtype)
        shards = _pack(stages, tasks, dtype)
        manifest: dict[str, Any] = {k: plan[k] for k in ("format", "tokenizer", "options", "inputs")}
        manifest["dtype"] = dtype.name
        manifest["sources"] = {name: _source_summary(state, tasks, name, shards) for name in options.sources}
        manifest["shards"] = {s["file"]: {k: v for k, v in s.items() if k != "file"} for s in shards}
        write_json(partial / MANIFEST, manifest)
        _finish(partial, out)
    return Preparation(out, manifest, time.monotonic() - started)


def _already_there(out: Path, plan: dict[str, Any]) -> Preparation:
    """A finished output, if it is what is asked for and whole.

    :raises UserError: otherwise.
    """
    manifest = read_manifest(out / MANIFEST)
    for name in ("format", "options", "tokenizer", "inputs"):
        if manifest.get(name) != plan[name]:
            hint = "choose another output, or pass --overwrite to replace it once the new one is complete"
            raise UserError("output", f"a folder prepared with the same {name}", str(out), hint)
    for name, entry in manifest["shards"].items():
        path = out / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            hint = "--overwrite makes it again"
            raise UserError("output", f"{path} with {entry['bytes']} bytes", size or "no file", hint)
    shutil.rmtree(out / STATE, ignore_errors=True)  # left by a kill between the last two steps
    return Preparation(out, manifest, 0.0)
