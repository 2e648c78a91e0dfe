"""Tokenizing throughput: the tokenizers library alone beside scripts/prepare_data.py, in one run, to a CSV.

python scripts/bench_data.py --out tokenizing.csv [--text FILE.jsonl] [--workers N]
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the CSV to write")
    parser.add_argument("--text", help="a .jsonl file with the field text; without it Python's standard library")
    parser.add_argument("--tokenizer", default="gpt-neox")
    parser.add_argument("--workers", type=int, help="one a core if not given")
    parser.add_argument("--megabytes", type=float, default=200.0, help="of the standard library's text")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    from rich.console import Console

    from moda.data.prepare.benchmark import benchmark
    from moda.errors import UserError

    try:
        benchmark(
            args.text,
            args.out,
            Console(),
            tokenizer=args.tokenizer,
            workers=args.workers,
            megabytes=args.megabytes,
            repeats=args.repeats,
        )
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
