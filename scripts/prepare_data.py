"""Text to token files, a mirror of a data mix, a look at prepared data.

python scripts/prepare_data.py tokenize [FILE.yaml] [key=value ...]     text of any size to shards and a manifest
python scripts/prepare_data.py mirror MIX FOLDER --from URL [...]       download a mix, or what a token budget needs
python scripts/prepare_data.py inspect FOLDER [...]                     what prepared data holds
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from typing import Any


def _tokenize(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moda.data.prepare import load_options, prepare
    from moda.data.prepare.summary import show

    given = list(args.arguments)
    file = given.pop(0) if given and "=" not in given[0] else None
    options = load_options(file, given)
    console = Console()
    show(prepare(options, restart=args.restart, overwrite=args.overwrite, console=console), console)
    return 0


def _mirror(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moda.data.mirror import MirrorOptions, mirror

    tokens = None if args.tokens is None else int(float(args.tokens))
    options = MirrorOptions(
        args.mix,
        args.folder,
        args.source,
        args.tokenizer,
        tokens,
        args.seed,
        args.connections,
        args.timeout,
        args.retries,
    )
    return mirror(options, Console(), dry_run=args.dry_run, verify=args.verify)


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moda.data.inspect import inspect

    inspect(args.folder, Console(), samples=args.samples, plot=args.plot, tokenizer=args.tokenizer, seed=args.seed)
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("tokenize", help="text to token files", description="Options: see docs/data.md.")
    p.add_argument(
        "arguments", nargs="+", metavar="FILE.yaml | key=value", help="for example output=data/mine sources.a=a.txt"
    )
    p.add_argument("--restart", action="store_true", help="throw away an unfinished preparation of this output")
    p.add_argument("--overwrite", action="store_true", help="replace a finished output once the new one is complete")
    p.set_defaults(run=_tokenize)

    p = commands.add_parser("mirror", help="download a data mix of OLMo-core")
    p.add_argument("mix", help="OLMoE-mix-0824, v3-small-ppl-validation, ...")
    p.add_argument("folder", help="the local mirror; then data.base_dir of a run")
    p.add_argument("--from", dest="source", default="https://olmo-data.org", help="base URL (http, https) or folder")
    p.add_argument("--tokenizer", default="dolma2")
    p.add_argument(
        "--tokens", help="a token budget such as 400e9: the same subset for everyone; without it the whole mix"
    )
    p.add_argument("--seed", type=int, default=0, help="of the subset")
    p.add_argument("--connections", type=int, default=8, help="downloads at a time")
    p.add_argument(
        "--timeout", type=float, default=30.0, help="seconds without a byte after which a download is begun again"
    )
    p.add_argument("--retries", type=int, default=8, help="attempts per file before giving up")
    p.add_argument(
        "--verify", action="store_true", help="hash the files that are there already and fetch damaged ones again"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be downloaded, and exit")
    p.set_defaults(run=_mirror)

    p = commands.add_parser("inspect", help="a look at prepared data")
    p.add_argument("folder", nargs="+", help="prepared folders, or token files (then with --tokenizer)")
    p.add_argument("--samples", type=int, default=3, help="decoded documents to show a source")
    p.add_argument("--plot", help="write the histogram of document lengths to this file (.png, .svg, .pdf)")
    p.add_argument("--tokenizer", help="to decode with, where the manifest's is not at its place")
    p.add_argument("--seed", type=int, default=0, help="which samples")
    p.set_defaults(run=_inspect)
    return parser


def _interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    args = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moda").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupted)

    from moda.errors import UserError

    try:
        return args.run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
