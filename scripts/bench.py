"""Benchmarks. ``python scripts/bench.py NAME --help`` says what each measures."""

import sys

from moda_cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
