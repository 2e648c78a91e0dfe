"""How fast a preparation is beside the tokenizers library alone: same text, same cores, one run, a CSV."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from rich.console import Console
from rich.table import Table

from moda.config.schema import TokenizerSection
from moda.data.text import PYTHON_STDLIB, read_documents
from moda.data.tokenizer import load_tokenizer
from moda.errors import UserError

from .options import PrepareOptions
from .run import prepare
from .tokenize import load

__all__ = ["benchmark"]

_ALONE = ("tokenizers, threads", "tokenizers, processes")
_OURS = "prepare_data"
_ONE_CORE = ("tokenizers, CPU seconds of one core", "prepare_data, CPU seconds of one core")


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


def _encode(tokenizer: str, texts: List[str]) -> int:
    encoder, tokens = load(tokenizer), 0
    for i in range(0, len(texts), 256):
        tokens += sum(len(e.ids) for e in encoder.encode_batch_fast(texts[i : i + 256], add_special_tokens=False))
    return tokens


def _threads(tokenizer: str, texts: List[str], workers: int) -> float:
    """Seconds of one process with the library's own threads; the text is in memory and the ids are dropped."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    began = time.perf_counter()
    _encode(tokenizer, texts)
    return time.perf_counter() - began


def _one_core(tokenizer: str, texts: List[str], workers: int) -> float:
    """CPU seconds of one process without threads: a figure that other work on the machine hardly changes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    load(tokenizer)
    began = time.process_time()
    _encode(tokenizer, texts)
    return time.process_time() - began


def _alone(tokenizer: str, texts: List[str], ready: Any, go: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    load(tokenizer)
    ready.release()
    go.wait()
    _encode(tokenizer, texts)


def _processes(tokenizer: str, texts: List[str], workers: int) -> float:
    """Seconds of one process a core, without threads, from the moment that all have their tokenizer and their text."""
    context = multiprocessing.get_context("fork")  # the text is shared, not copied
    ready, go = context.Semaphore(0), context.Event()
    shares = [texts[i::workers] for i in range(workers)]
    made = [context.Process(target=_alone, args=(tokenizer, share, ready, go)) for share in shares]
    for p in made:
        p.start()
    for _ in made:
        ready.acquire()
    began = time.perf_counter()
    go.set()
    for p in made:
        p.join()
    return time.perf_counter() - began


def _commit() -> str:
    try:
        here = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def benchmark(
    text: Optional[str],
    out: str,
    console: Console,
    *,
    tokenizer: str = "gpt-neox",
    workers: Optional[int] = None,
    megabytes: float = 200.0,
    repeats: int = 3,
) -> List[Dict[str, Any]]:
    """Time the library alone and a whole preparation, in turns, and write a CSV.

    The library alone gets the text in memory and drops its ids. A preparation is timed from the call to the finished
    folder: it starts its processes, reads and parses the file, tokenizes, splits, writes, packs and hashes.

    :param text: a .jsonl file with the field ``text``; None for Python's standard library, ``megabytes`` of it.
    :param out: the CSV.

    :returns: its rows, the median of ``repeats`` with the fastest and slowest.
    """
    import tokenizers

    found = load_tokenizer(TokenizerSection(tokenizer))
    name = str(found.path) if found.path is not None else str(found.config.identifier)
    cores = workers or len(os.sched_getaffinity(0))
    seconds: Dict[str, List[float]] = {v: [] for v in (*_ALONE, _OURS, *_ONE_CORE)}
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

        def one_core(tokenizer_path: str, texts: List[str], workers: int) -> float:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            began = time.process_time()
            whole(tokenizer_path, texts, 1)
            return time.process_time() - began

        def whole(tokenizer_path: str, texts: List[str], workers: int) -> float:
            nonlocal tokens
            folder = Path(scratch) / "out"
            shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            done = prepare(PrepareOptions(str(folder), {"text": str(path)}, tokenizer, workers=workers), console=quiet)
            tokens = done.manifest["sources"]["text"]["tokens"]
            return time.perf_counter() - began

        quiet = Console(quiet=True)
        os.environ["RAYON_NUM_THREADS"] = str(cores)
        runs: Dict[str, Callable[[str, List[str], int], float]] = dict(
            zip(seconds, (_threads, _processes, whole, _one_core, one_core))
        )
        # Processes are forked, and the library refuses its threads in a process that was forked after using them.
        order = [_ALONE[1], _OURS, *_ONE_CORE, _ALONE[0]]
        for _ in range(repeats):
            for variant in order:
                seconds[variant].append(runs[variant](name, texts, cores))
                console.print(f"{variant}: {size / seconds[variant][-1] / 1e6:.2f} MB/s", highlight=False)
    best = {v: min(statistics.median(seconds[a]) for a in _ALONE) for v in (*_ALONE, _OURS)}
    best.update(dict.fromkeys(_ONE_CORE, statistics.median(seconds[_ONE_CORE[0]])))
    rows: List[Dict[str, Any]] = [
        {
            "variant": v, "workers": 1 if v in _ONE_CORE else cores, "documents": len(texts), "bytes": size, "tokens": tokens,
            "seconds_median": round(statistics.median(s), 3), "seconds_min": round(min(s), 3),
            "seconds_max": round(max(s), 3), "mb_per_s": round(size / statistics.median(s) / 1e6, 3),
            "of_best_alone": round(best[v] / statistics.median(s), 4), "repeats": repeats, "tokenizer": tokenizer,
            "tokenizers": tokenizers.__version__, "python": platform.python_version(), "cpu": _cpu(), "commit": _commit(),
        }
        for v, s in seconds.items()
    ]  # fmt: skip
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = Table("variant", "MB/s", "of the best alone", title=f"{size / 1e6:.0f} MB, {cores} workers")
    for row in rows:
        table.add_row(row["variant"], f"{row['mb_per_s']:.2f}", f"{row['of_best_alone']:.1%}")
    console.print(table)
    return rows
