"""The benchmarks of the kernels, without the rest of the project: ``python -m moda_kernels.benchmarks kernels --table 2``."""

import sys
from pathlib import Path

from .registry import build_parser, run

names = ("kernels", "tiles", "sources")
sys.exit(run(build_parser([f"moda_kernels.benchmarks.{name}" for name in names], Path()).parse_args()))
