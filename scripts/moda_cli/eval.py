"""Perplexity and downstream accuracy of checkpoints, in the terms of the paper's Tables 4 and 5.

A checkpoint is a run's folder (its newest whole checkpoint), a stepN folder of this project or of OLMo-core, or a
Hugging Face folder.

Examples:
  %(prog)s runs/moda_demo/step480 --suite downstream --tasks copa sciq --limit 50
  %(prog)s runs/moda_demo/step480 --suite perplexity --text code=src --text prose=docs
  %(prog)s runs/a/step100 runs/b/step100 --base-dir /data/olmo --paper
  torchrun --nproc-per-node=8 scripts/eval.py CHECKPOINT ...
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moda.errors import UserError
from moda.ranges import Count

from ._options import add_model_options, from_arguments, new_parser, number

RESUME = "the same command continues with the tasks that are left"


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("checkpoint", nargs="+", help="folder of a checkpoint")
    p.add_argument("--suite", choices=["perplexity", "downstream", "all"], default="all", help="what to measure")
    p.add_argument(
        "--limit", type=number(Count), metavar="N", help="only the first N questions of a task, documents of a set"
    )
    text = "tokens per batch (default: 32768 on a GPU, 4096 on a CPU)"
    p.add_argument("--batch-size", type=number(Count), metavar="TOKENS", dest="batch_tokens", help=text)
    add = p.add_argument_group("downstream tasks").add_argument
    add("--tasks", nargs="+", metavar="TASK", help="default: the paper's ten and MMLU cloze")
    add("--truncate", action="store_true", help="cut prompts longer than the context from the left")
    add("--per-example", action="store_true", help="write every question's scores to examples/<task>.jsonl")
    add = p.add_argument_group("perplexity").add_argument
    add("--sets", nargs="+", metavar="SET", help="sets of the paper's Table 5 (default: all ten)")
    add("--base-dir", metavar="FOLDER", help="folder or URL that has the sets' eval-data/perplexity/...")
    add("--skip-missing", action="store_true", help="leave out sets whose data is absent")
    add("--text", action="append", default=[], metavar="NAME=PATH", help="text of your own, by domain")
    add("--token-files", action="append", default=[], metavar="NAME=GLOB", help="token files of your own")
    add("--window", type=number(Count), metavar="N", help="tokens per window (default: the context, at most 4096)")
    add("--stride", type=number(Count), metavar="N", help="tokens between windows (default: half a window)")
    add("--head", action="store_true", help="only each document's first window, as validation in training does")
    add = p.add_argument_group("results").add_argument
    add("--output", default="results/eval", metavar="FOLDER", help="folder of the results")
    add("--paper", action="store_true", help="show the paper's printed rows beside the results")
    add("--fresh", action="store_true", help="measure again what is already finished")
    add_model_options(p, ["float32", "bfloat16", "float16"])
    return p


def _by_name(key: str, pairs: Sequence[str]) -> dict[str, list[str]]:
    """``NAME=PATH`` options; a name may come several times."""
    out: dict[str, list[str]] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not name or not path or "/" in name:
            raise UserError(key, "NAME=PATH", pair)
        out.setdefault(name, []).append(path)
    return out


def _join() -> tuple[int, str | None]:
    """Join the other processes of torchrun; this process's rank and device."""
    import torch

    from moda.train.environment import launched_world_size

    if launched_world_size() == 1:
        return 0, None
    torch.distributed.init_process_group("gloo")  # only results are exchanged, which are on the CPU
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    return torch.distributed.get_rank(), f"cuda:{local % gpus}" if gpus else None


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    from moda.progress import AboveBars
    from moda_evals.report import notes, table, write_reports
    from moda_evals.run import Options, evaluate_all

    rank, device = _join()
    options = from_arguments(
        Options, args, device=args.device or device,
        text=_by_name("--text", args.text), token_files=_by_name("--token-files", args.token_files),
        tasks=args.tasks and tuple(args.tasks), sets=args.sets and tuple(args.sets),
    )  # fmt: skip
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[AboveBars()])
    for name in ("moda", "moda_evals"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.ERROR)
    output = Path(args.output)
    results = evaluate_all(args.checkpoint, options, output)
    if rank == 0:
        labels = [result["model"]["label"] for result in results]
        for label, result in zip(labels, results):
            write_reports([result], output / label, args.paper)
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
        console.print(table(results, args.paper))
        for note in notes(results, args.paper):
            console.print(note, highlight=False)
        if len(results) > 1:
            write_reports(results, output, args.paper)
        print("results: " + ", ".join(str(output / label / "results.json") for label in labels))
    return 0
