"""Turn text of any size into token files, mirror a data mix, inspect prepared data.

Examples:
  %(prog)s tokenize output=data/mine tokenizer=gpt-neox sources.web='text/web/*.jsonl.zst'
  %(prog)s inspect data/mine
  %(prog)s mirror OLMoE-mix-0824 /data/olmo --tokens 400e9 --dry-run
"""

import argparse
import logging
import signal
from pathlib import Path
from typing import Annotated, Any

from moda.files import PLOTS, check_writable
from moda.ranges import Count, Range, Seed, Tokens

from ._options import Help, add_help_config, from_arguments, new_parser, number

RESUME = "the same command continues from here"


def parser() -> argparse.ArgumentParser:
    top = new_parser(__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands")
    p = commands.add_parser("tokenize", help="text to token files", description="docs/configuration.md lists the keys.")
    add_help_config(p, "prepare")
    p.add_argument("arguments", nargs="+", metavar="FILE.yaml | key=value", help="output=data/mine sources.a=a.txt ...")
    p.add_argument("--restart", action="store_true", help="throw away an unfinished preparation of this output")
    p.add_argument("--overwrite", action="store_true", help="replace a finished output once the new one is complete")
    p.set_defaults(action=_tokenize)

    p = commands.add_parser("mirror", help="download a data mix, or what a token budget needs", formatter_class=Help)
    p.add_argument("mix", help="OLMoE-mix-0824, v3-small-ppl-validation, ...")
    p.add_argument("folder", help="the local mirror; then data.base_dir of a run")
    p.add_argument("--from", dest="source", default="https://olmo-data.org", metavar="URL", help="URL or folder")
    p.add_argument("--tokenizer", default="dolma2", help="whose token files")
    p.add_argument(
        "--tokens", type=number(Tokens), metavar="N", help="a budget such as 400e9: the same subset for everyone"
    )
    p.add_argument("--seed", type=number(Seed), default=0, help="of the subset")
    p.add_argument("--connections", type=number(Annotated[int, Range(1, 1024)]), default=8, help="parallel downloads")
    p.add_argument(
        "--timeout",
        type=number(Annotated[float, Range(0, 86400, above=True)]),
        default=30.0,
        help="seconds without a byte before a download starts again",
    )
    p.add_argument("--retries", type=number(Count), default=8, help="attempts per file before giving up")
    p.add_argument("--verify", action="store_true", help="hash existing files, and download damaged ones again")
    p.add_argument("--dry-run", action="store_true", help="say what would be downloaded, and exit")
    p.set_defaults(action=_mirror)

    p = commands.add_parser("inspect", help="show what prepared data holds", formatter_class=Help)
    p.add_argument("folder", nargs="+", help="prepared folders, or token files (then with --tokenizer)")
    p.add_argument(
        "--samples",
        type=number(Annotated[int, Range(0, 10**6)]),
        default=3,
        help="decoded documents to show per source",
    )
    p.add_argument("--plot", metavar="FILE", help="write the histogram of document lengths (png, svg or pdf)")
    p.add_argument("--tokenizer", help="to decode with, if the manifest's cannot be reached")
    p.add_argument("--seed", type=number(Seed), default=0, help="which samples")
    p.set_defaults(action=_inspect)
    return top


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moda").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    return args.action(args, Console(markup=False))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _tokenize(args: argparse.Namespace, console: Any) -> int:
    from moda.data.prepare import load_options, prepare
    from moda.data.prepare.summary import show

    given = list(args.arguments)
    file = given.pop(0) if "=" not in given[0] else None
    options = load_options(file, given)
    show(prepare(options, restart=args.restart, overwrite=args.overwrite, console=console), console)
    return 0


def _mirror(args: argparse.Namespace, console: Any) -> int:
    from moda.data.mirror import MirrorOptions, mirror

    return mirror(from_arguments(MirrorOptions, args), console, dry_run=args.dry_run, verify=args.verify)


def _inspect(args: argparse.Namespace, console: Any) -> int:
    from moda.data.inspect import inspect

    if args.plot is not None:
        check_writable("--plot", Path(args.plot), PLOTS)
    inspect(args.folder, console, samples=args.samples, plot=args.plot, tokenizer=args.tokenizer, seed=args.seed)
    return 0
