"""Compare two evaluations: B minus A, with paired bootstrap intervals.

Examples:
  %(prog)s results/eval/olmo2_700m-step95368 results/eval/moda_700m-step95368 --paper --plot diff.png
"""

import argparse
import sys
from pathlib import Path
from typing import Annotated

from moda.ranges import Range

from ._options import new_parser, number


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("a", metavar="A", help="results.json of `moda eval`, or its folder")
    p.add_argument("b", metavar="B", help="the same of the other model")
    p.add_argument("--paper", action="store_true", help="add the paper's difference of the pair nearest in size")
    p.add_argument("--draws", type=number(Annotated[int, Range(1, 10**7)]), default=10_000, help="bootstrap samples")
    p.add_argument("--plot", metavar="FILE", help="write a plot (png, svg or pdf)")
    p.add_argument("--output", metavar="FILE", help="write the table as Markdown")
    return p


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moda.files import PLOTS, check_writable, write_text
    from moda_evals.compare import best_paper_pair, compare, comparison_table, markdown, plot
    from moda_evals.results import read_results

    if args.output:
        check_writable("--output", Path(args.output))
    if args.plot:
        check_writable("--plot", Path(args.plot), PLOTS)
    a, b = read_results(Path(args.a)), read_results(Path(args.b))
    differences = compare(a, b, draws=args.draws, paper=best_paper_pair(a, b) if args.paper else None)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(comparison_table(a, b, differences))
    if args.output:
        write_text(Path(args.output), markdown(a, b, differences))
    if args.plot:
        plot(a, b, differences, Path(args.plot))
        print(f"plot: {args.plot}")
    return 0
