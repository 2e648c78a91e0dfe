"""Tokenizing throughput: the tokenizers library alone beside a whole preparation; same text, same cores, one run."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number
from moda_kernels.benchmarks.timing import quantiles, seconds

if TYPE_CHECKING:
    from rich.console import Console


_ALONE, _OURS = "tokenizers", "prepare_data"


def _write_text(path: Path, megabytes: float) -> None:
    """Python's standard library as JSON lines, over and over until there is enough."""
    from moda.data.text import PYTHON_STDLIB, read_documents

    documents = [d.text for d in read_documents([PYTHON_STDLIB])]
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as f:
        while left > 0:
            for text in documents:
                f.write(json.dumps({"text": text}) + "\n")
                left -= len(text)
                if left <= 0:
                    break


def _encode(encoder: Any, texts: list[str]) -> None:
    """The library with its own threads; the text is in memory and the ids are dropped."""
    for i in range(0, len(texts), 256):
        sum(len(e.ids) for e in encoder.encode_batch_fast(texts[i : i + 256], add_special_tokens=False))


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

    The library alone runs one thread per core, gets the text in memory and drops its ids. A preparation is timed from the call
    to the finished folder: it starts its processes, reads and parses the file, tokenizes, splits, writes, packs and hashes.

    :param text: a .jsonl file with the field ``text``; None for Python's standard library, ``megabytes`` of it.
    :param out: the CSV.

    :returns: its rows, the median of ``repeats`` with the fastest and slowest, and the median of the preparation's speed over
        that of the library just before and after it.
    """
    import tokenizers
    from rich.console import Console
    from rich.table import Table

    from moda.config.schema import TokenizerSection
    from moda.data.manifest import MANIFEST, read_manifest
    from moda.data.prepare.options import PrepareOptions
    from moda.data.prepare.run import prepare
    from moda.data.tokenizer import load_encoder, load_tokenizer
    from moda.errors import UserError

    named = load_tokenizer(TokenizerSection(tokenizer))
    encoder = load_encoder(str(named.path) if named.path is not None else str(named.config.identifier))
    cores = workers or len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    taken: dict[str, list[float]] = {_ALONE: [], _OURS: []}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(text) if text is not None else Path(scratch) / "text.jsonl"
        if text is None:
            _write_text(path, megabytes)
        try:
            texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
            size = sum(len(t.encode()) for t in texts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError("--text", "a .jsonl file with texts in the field text", str(path), str(e)) from None
        options = PrepareOptions(str(Path(scratch) / "out"), {"text": str(path)}, tokenizer, workers=workers)
        runs: dict[str, Callable[[], Any]] = {
            _ALONE: functools.partial(_encode, encoder, texts),
            _OURS: functools.partial(prepare, options, console=Console(quiet=True)),
        }
        for variant in [_ALONE] + [_OURS, _ALONE] * repeats:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            if variant == _OURS:
                shutil.rmtree(options.output, ignore_errors=True)
            taken[variant].append(seconds(runs[variant]))
            console.print(f"{variant}: {size / taken[variant][-1] / 1e6:.2f} MB/s", highlight=False)
        tokens = read_manifest(Path(options.output) / MANIFEST)["sources"]["text"]["tokens"]
    alone = taken[_ALONE]
    share = statistics.median((a + b) / 2 / ours for a, ours, b in zip(alone, taken[_OURS], alone[1:]))
    rows: list[dict[str, Any]] = []
    for variant, times in taken.items():
        q = quantiles(times)
        rows.append({
            "variant": variant, "workers": cores, "documents": len(texts), "bytes": size, "tokens": tokens,
            "seconds_median": round(q.median, 3), "seconds_p20": round(q.p20, 3), "seconds_p80": round(q.p80, 3),
            "seconds_min": round(min(times), 3), "seconds_max": round(max(times), 3),
            "mb_per_s": round(size / q.median / 1e6, 3), "of_tokenizers": round(share if variant == _OURS else 1.0, 4),
            "repeats": len(times), "tokenizer": tokenizer, "tokenizers": tokenizers.__version__,
        })  # fmt: skip
    results.write(Path(out), rows)
    table = Table("variant", "MB/s", "of tokenizers alone", title=f"{size / 1e6:.0f} MB, {cores} workers")
    for row in rows:
        table.add_row(row["variant"], f"{row['mb_per_s']:.2f}", f"{row['of_tokenizers']:.1%}")
    console.print(table)
    return rows


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    del root
    parser.add_argument("--out", required=True, help="the CSV to write")
    parser.add_argument("--text", help="a .jsonl file with the field text; without it Python's standard library")
    parser.add_argument("--tokenizer", default="gpt-neox")
    parser.add_argument("--workers", type=number(int, 1), help="one per core if not given")
    parser.add_argument(
        "--megabytes", type=number(float, 0, above=True), default=200.0, help="of the standard library's text"
    )
    parser.add_argument("--repeats", type=number(int, 1), default=5)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    names = ("text", "out", "tokenizer", "workers", "megabytes", "repeats")
    benchmark(console=Console(), **{name: getattr(args, name) for name in names})


BENCHMARK = Benchmark("data", "tokenizing, beside the tokenizers library alone", _add_options, _run)
