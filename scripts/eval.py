"""Evaluate checkpoints: perplexity and downstream accuracy, in the terms of the paper's Tables 4 and 5.

python scripts/eval.py CHECKPOINT [CHECKPOINT ...] [--suite perplexity|downstream|all] [--tasks ...] [--limit N]
torchrun --nproc-per-node=8 scripts/eval.py CHECKPOINT ...
python scripts/eval.py compare A/results.json B/results.json [--paper] [--plot FILE]

A checkpoint is a stepN folder of this project or of OLMo-core, or a Hugging Face folder. Interrupted, the same command goes on
with the tasks that are left.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _named(key: str, pairs: Sequence[str]) -> dict[str, list[str]]:
    """``NAME=PATH`` options; a name may come several times."""
    from moda.errors import UserError

    out: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path or "/" in name:
            raise UserError(key, "NAME=PATH", pair)
        out.setdefault(name, []).append(path)
    return out


def _eval_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="+", help="folder of a checkpoint")
    p.add_argument("--suite", choices=["perplexity", "downstream", "all"], default="all")
    p.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="downstream tasks (default: the paper's ten and MMLU cloze)"
    )
    p.add_argument("--sets", nargs="+", metavar="SET", help="sets of the paper's Table 5 (default: all ten)")
    p.add_argument("--base-dir", help="folder or URL under which the sets' eval-data/perplexity/... lies")
    p.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="text of your own, by domain")
    p.add_argument("--token-files", action="append", default=[], metavar="NAME=GLOB", help="token files of your own")
    p.add_argument("--window", type=int, help="tokens in a window (default: the model's context, at most 4096)")
    p.add_argument("--stride", type=int, help="tokens between windows (default: half a window)")
    p.add_argument("--head", action="store_true", help="only the first window of each document, as in-loop validation")
    p.add_argument("--limit", type=int, help="only the first N questions of a task and documents of a set")
    p.add_argument(
        "--batch-size", type=int, metavar="TOKENS", help="tokens in a batch (default: 32768 on a GPU, 4096 on a CPU)"
    )
    p.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    p.add_argument("--tokenizer", help="tokenizer.json where the checkpoint's own cannot be reached")
    p.add_argument("--context-length", type=int, help="allow this many tokens instead of what the model was trained on")
    p.add_argument("--truncate", action="store_true", help="cut prompts longer than the context from the left")
    p.add_argument("--skip-missing", action="store_true", help="leave out sets whose data is absent")
    p.add_argument("--per-example", action="store_true", help="write every question's scores to examples/<task>.jsonl")
    p.add_argument("--paper", action="store_true", help="show the paper's printed rows beside the results")
    p.add_argument("--fresh", action="store_true", help="measure again what is already finished")
    p.add_argument("--output", default="results/eval", help="folder of the results (default results/eval)")
    return p


def _compare_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="eval.py compare", description="B against A with paired bootstrap intervals.")
    p.add_argument("a", help="results.json or its folder")
    p.add_argument("b", help="results.json or its folder")
    p.add_argument(
        "--paper", action="store_true", help="add the paper's printed difference (of the pair nearest in size)"
    )
    p.add_argument("--draws", type=int, default=10_000, help="bootstrap samples")
    p.add_argument("--plot", metavar="FILE", help="write a plot (png, svg or pdf)")
    p.add_argument("--output", metavar="FILE", help="write the table as Markdown")
    return p


def _compare(argv: Sequence[str]) -> int:
    from rich.console import Console

    from moda_evals.compare import best_paper_pair, compare, comparison_table, markdown, plot
    from moda_evals.run import read_results

    args = _compare_parser().parse_args(argv)
    a, b = read_results(Path(args.a)), read_results(Path(args.b))
    differences = compare(a, b, draws=args.draws, paper=best_paper_pair(a, b) if args.paper else None)
    Console(width=None if sys.stdout.isatty() else 160).print(comparison_table(a, b, differences))
    if args.output:
        Path(args.output).write_text(markdown(a, b, differences), encoding="utf-8")
    if args.plot:
        plot(a, b, differences, Path(args.plot))
        print(f"plot: {args.plot}")
    return 0


def _join() -> tuple[int, str | None]:
    """Join the other processes of torchrun; this process's rank and device."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, None
    dist.init_process_group("gloo")  # only results are exchanged, which are on the CPU
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return dist.get_rank(), f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else None


def _evaluate(argv: Sequence[str]) -> int:
    from rich.console import Console

    from moda_evals.model import checkpoint_label
    from moda_evals.report import notes, table, write_reports
    from moda_evals.run import Options, evaluate, labels_of

    args = _eval_parser().parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k not in ("checkpoint", "paper", "output", "batch_size")}
    options.update(text=_named("--text", args.text), token_files=_named("--token-files", args.token_files))
    options.update({k: tuple(v) for k, v in options.items() if k in ("tasks", "sets") and v is not None})
    checked = Options(**options, batch_tokens=args.batch_size)
    labels = labels_of([checkpoint_label(Path(c)) for c in args.checkpoint])
    rank, device = _join()
    if device is not None and checked.device is None:
        import dataclasses

        checked = dataclasses.replace(checked, device=device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moda_evals").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    output = Path(args.output)
    results = [evaluate(c, checked, output / label, label) for c, label in zip(args.checkpoint, labels)]
    if rank == 0:
        for label, result in zip(labels, results):
            write_reports([result], output / label, args.paper)
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(table(results, args.paper))
        for note in notes(results, args.paper):
            console.print(note, highlight=False)
        if len(results) > 1:
            write_reports(results, output, args.paper)
        print("results: " + ", ".join(str(output / label / "results.json") for label in labels))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    from moda.errors import UserError

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _compare(arguments[1:]) if arguments[:1] == ["compare"] else _evaluate(arguments)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the tasks that are left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
