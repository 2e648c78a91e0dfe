"""How fast a preparation is beside the tokenizers library alone: same text, same cores, one run, a CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moda.config.schema import TokenizerSection
from moda.data.text import PYTHON_STDLIB, read_documents
from moda.data.tokenizer import load_encoder, load_tokenizer
from moda.errors import UserError
from moda_kernels.benchmarks.provenance import commit

from .options import PrepareOptions
from .run import prepare

__all__ = ["benchmark"]

_ALONE, _OURS = "tokenizers", "prepare_data"


def _write_text(path: Path, megabytes: float) -> None:
    """Python's standard library as JSON lines, over and over until there is enough."""
    documents = [d.text for d in read_documents([PYTHON_STDLIB])]
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as f:
        while left > 0:
            for text in documents:
                f.write(json.dumps({"text": text}) + "\n")
                left -= len(text)
                if left <= 0:
                    break


def _alone(tokenizer: str, texts: list[str]) -> float:
    """Seconds of the library with its own threads; the text is in memory and the ids are dropped."""
    encoder = load_encoder(tokenizer)
    began = time.perf_counter()
    for i in range(0, len(texts), 256):
        sum(len(e.ids) for e in encoder.encode_batch_fast(texts[i : i + 256], add_special_tokens=False))
    return time.perf_counter() - began


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def benchmark(
    text: str | None,
    out: str,
    console: Console,
    *,
    tokenizer: str = "gpt-neox",
    workers: int | None = None,
    megabytes: float = 200.0,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Time the library alone and a whole preparation, in turns, and write a CSV.

    The library alone runs a thread a core, gets the text in memory and drops its ids. A preparation is timed from the call to the
    finished folder: it starts its processes, reads and parses the file, tokenizes, splits, writes, packs and hashes.

    :param text: a .jsonl file with the field ``text``; None for Python's standard library, ``megabytes`` of it.
    :param out: the CSV.

    :returns: its rows, the median of ``repeats`` with the fastest and slowest, and the median of the preparation's speed over
        that of the library just before and after it.
    """
    import tokenizers

    if repeats < 1:
        raise UserError("--repeats", "at least 1", repeats)
    found = load_tokenizer(TokenizerSection(tokenizer))
    name = str(found.path) if found.path is not None else str(found.config.identifier)
    cores = workers or len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    quiet = Console(quiet=True)
    seconds: dict[str, list[float]] = {_ALONE: [], _OURS: []}
    tokens = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(text) if text is not None else Path(scratch) / "text.jsonl"
        if text is None:
            _write_text(path, megabytes)
        try:
            texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError("--text", "a .jsonl file with the field text", str(path), str(e)) from None
        size = sum(len(t.encode()) for t in texts)

        def note(variant: str, taken: float) -> None:
            seconds[variant].append(taken)
            console.print(f"{variant}: {size / taken / 1e6:.2f} MB/s", highlight=False)

        for turn in range(repeats + 1):
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            note(_ALONE, _alone(name, texts))
            if turn < repeats:
                folder = Path(scratch) / "out"
                shutil.rmtree(folder, ignore_errors=True)
                began = time.perf_counter()
                done = prepare(
                    PrepareOptions(str(folder), {"text": str(path)}, tokenizer, workers=workers), console=quiet
                )
                note(_OURS, time.perf_counter() - began)
                tokens = done.manifest["sources"]["text"]["tokens"]
    alone = seconds[_ALONE]
    share = statistics.median((a + b) / 2 / ours for a, ours, b in zip(alone, seconds[_OURS], alone[1:]))
    rows: list[dict[str, Any]] = [
        {
            "variant": v, "workers": cores, "documents": len(texts), "bytes": size, "tokens": tokens,
            "seconds_median": round(statistics.median(s), 3), "seconds_min": round(min(s), 3),
            "seconds_max": round(max(s), 3), "mb_per_s": round(size / statistics.median(s) / 1e6, 3),
            "of_tokenizers": round(share if v == _OURS else 1.0, 4), "repeats": len(s), "tokenizer": tokenizer,
            "tokenizers": tokenizers.__version__, "python": platform.python_version(), "cpu": _cpu(), "commit": commit(),
        }
        for v, s in seconds.items()
    ]  # fmt: skip
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = Table("variant", "MB/s", "of tokenizers alone", title=f"{size / 1e6:.0f} MB, {cores} workers")
    for row in rows:
        table.add_row(row["variant"], f"{row['mb_per_s']:.2f}", f"{row['of_tokenizers']:.1%}")
    console.print(table)
    return rows
