"""Report on runs: a page with tables and charts, Markdown, CSV and the loss curves as a picture.

Examples:
  %(prog)s runs/moda_demo
  %(prog)s runs/moda_demo runs/olmo2_demo --out runs/comparison
  %(prog)s runs/sweep --baseline olmo2
"""

import argparse
from pathlib import Path

from ._options import new_parser


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder, or a folder of runs")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: FOLDER, or report for several)")
    p.add_argument(
        "--baseline",
        metavar="NAME",
        help="the variant or run to compare with (default: the first without a depth mechanism)",
    )
    return p


def run(args: argparse.Namespace) -> int:
    from moda.report import FILES, write_report

    out = args.out or (args.folders[0] if len(args.folders) == 1 else Path("report"))
    write_report(args.folders, out, args.baseline)
    for name in FILES:
        print(out / name)
    return 0
