"""Check a configuration and print it resolved, with parameters, FLOPs per token, memory, steps and data.

Examples:
  %(prog)s configs/moda_700m.yaml train.max_tokens=2e9
"""

import argparse

from . import train
from ._options import add_config_arguments, new_parser


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    add_config_arguments(p)
    p.set_defaults(dry_run=True)
    return p


run = train.run
