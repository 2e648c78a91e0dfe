"""``results.json`` and the finished parts of an evaluation: written, read, merged."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from moda.errors import UserError
from moda.files import read_json, write_json

from .scoring import world
from .suites import DOWNSTREAM, PERPLEXITY, SUITES, Suite
from .tasks import TASKS

log = logging.getLogger(__name__)

FORMAT = 1
RESULTS = "results.json"


def fingerprint(path: Path) -> str:
    """Tells a checkpoint from another one that later lies in the same place: by its checksums, or by size and time."""
    sums = path / "checksums.json"
    if sums.is_file():
        return hashlib.sha256(sums.read_bytes()).hexdigest()[:16]
    return stamp(p for pattern in ("*.safetensors", "model_and_optim/*") for p in path.glob(pattern))


def stamp(files: Iterable[Path]) -> str:
    """Tells files from what they later become, by name, size and time."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def check_writable(folder: Path) -> None:
    """Make the folder of the results.

    :raises UserError: where nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError("--output", "a folder that can be written", str(folder), e.strerror) from None


def reuse(
    suite: Suite, file: Path, key: dict[str, Any], fresh: bool, compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A finished part of an evaluation from its file, or computed on all ranks and written by rank 0.

    :param key: all that the figures depend on; the file counts only if it says the same.
    :param fresh: compute in any case.
    """
    key = json.loads(json.dumps(key))
    rank, ranks = world()
    part: dict[str, Any] = {}
    if not fresh and file.is_file():
        try:
            part = read_json(file, file.stem)
        except UserError as e:
            log.warning("measured again: %s", e)
    if part.get("key") == key and _is_whole(suite, part.get("result")):
        log.info("%s: already finished", file.stem)
        return part["result"]
    if ranks > 1:
        torch.distributed.barrier()  # all ranks have looked before rank 0 writes
    result = compute()
    if rank == 0:
        write_json(file, {"key": key, "result": result})
    return result


def merge_earlier(results: dict[str, Any], file: Path) -> None:
    """Add the figures of an earlier evaluation of the same checkpoint that were not measured again.

    :param results: the new results, changed in place.
    :param file: the earlier ``results.json``, if there is one.
    """
    if not file.is_file():
        return
    try:
        earlier = read_results(file)
    except UserError as e:
        log.warning("the earlier results are replaced: %s", e)
        return
    before, now = earlier.get("measured_with"), results["measured_with"]
    if before != now:
        before = before if isinstance(before, dict) else {}
        changes = ", ".join(f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k])
        log.warning("%s is replaced, because it was measured with other settings: %s", file, changes)
        return
    kept = []
    for suite in SUITES:
        entries = {n: e for n, e in earlier[suite.name].items() if n not in results[suite.name]}
        for name in [n for n, e in entries.items() if suite is DOWNSTREAM and not _same_questions(n, e)]:
            log.warning("%s: the earlier figures of %s are dropped: its questions have changed", file, name)
            del entries[name]
        results[suite.name] = {**entries, **results[suite.name]}
        kept += [e["title"] for e in entries.values()]
    skipped = {**earlier["skipped"], **results["skipped"]}
    results["skipped"] = {n: str(why) for n, why in skipped.items() if n not in results["perplexity"]}
    if kept:
        log.info("%s: the earlier figures of %s are kept", file, ", ".join(kept))


def _same_questions(name: str, entry: dict[str, Any]) -> bool:
    """Whether a task's entry is of the questions that it has now, as far as that can be told."""
    task = TASKS.get(name)
    try:
        return task is None or (task.source(), task.metric) == (entry.get("source"), entry["metric"])
    except UserError:  # its file is gone: what was measured then stays true
        return True


def _is_number(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, int) and abs(x) < 1 << 63)


def _is_whole(suite: Suite, entry: Any) -> bool:
    """Whether an entry of ``results.json`` has what reports and comparisons read."""
    if not isinstance(entry, dict):
        return False
    figures = [entry.get(key) for item in suite.figures.items() for key in item if key is not None]
    if suite is PERPLEXITY:
        documents = entry.get("documents")
        rows: list[Any] = [documents.get(key) for key in ("loss", "tokens")] if isinstance(documents, dict) else [None]
        sound = all(isinstance(row, list) and all(map(_is_number, row)) for row in rows)
        sound = sound and isinstance(entry.get("source"), str) and isinstance(entry.get("window"), dict)
        sound = sound and {"size", "stride", "head"} <= set(entry["window"])
    else:
        rows = [entry.get("correct")]
        sound = isinstance(rows[0], str) and isinstance(entry.get("metric"), str) and "truncated" in entry
    return (
        sound
        and all(len(row) == entry.get("n") != 0 for row in rows)
        and isinstance(entry.get("title"), str)
        and all(value is None or _is_number(value) for value in figures)
        and _is_number(entry.get(suite.figure))
    )


def read_results(path: Path) -> dict[str, Any]:
    """A results file, or the one in a folder.

    :raises UserError: for a file that is missing, damaged or none of ours.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError("results", f"an existing {RESULTS} or its folder", str(path))
    data = read_json(file, "results")
    sections = [data.get(key) for key in ("model", "skipped", *(suite.name for suite in SUITES))]
    if data.get("format") != FORMAT or not all(isinstance(section, dict) for section in sections):
        raise UserError("results", f"a {RESULTS} of scripts/eval.py", str(file))
    model = data["model"]
    if not (isinstance(model.get("label"), str) and isinstance(model.get("parameters"), int)):
        raise UserError("results", f"the model's label and parameters in {file}", "none")
    for suite in SUITES:
        for name, entry in data[suite.name].items():
            if not _is_whole(suite, entry):
                raise UserError("results", f"all figures of {suite.name} {name} in {file}", "a damaged entry")
    return data
