"""Train a model from a configuration file. The same command resumes from the newest complete checkpoint.

Examples:
  %(prog)s configs/moda_demo.yaml
  %(prog)s configs/moda_700m.yaml train.max_tokens=2e9 train.save_folder=runs/try
  torchrun --nproc-per-node=8 scripts/train.py configs/moda_1.5b.yaml
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from ._options import add_config_arguments, new_parser

RESUME = "the same command resumes from the newest checkpoint"


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    add_config_arguments(p)
    p.add_argument("--dry-run", action="store_true", help="only print the configuration and its sizes, as `moda plan`")
    return p


def run(args: argparse.Namespace) -> int:
    # Read when torch is imported. Large CPU tensors (a chunk of logits) go into huge pages: page faults otherwise take longer
    # than the arithmetic. Threads that wait for each other sleep: on a busy machine they would take cores from others.
    # A GPU's memory grows in place: what was freed in one size serves another.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moda.config import load_config
    from moda.train.run import plan, print_plan, train
    from moda_evals.in_loop import check_downstream, downstream_callbacks

    config = load_config(args.config, args.overrides)
    check_downstream(config)
    if args.dry_run:
        print_plan(plan(config))
        return 0
    outcome = train(config, downstream_callbacks)
    if outcome.stopped_by is not None and os.environ.get("RANK", "0") == "0":
        print(f"to continue: {_typed()}")
    return outcome.exit_code


def _typed() -> str:
    """The command that was given, as far as a process can tell."""
    program, *rest = sys.argv
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"the same torchrun command, with {shlex.join([program, *rest])}"
    if Path(program).suffix == ".py":
        return shlex.join(["python", program, *rest])
    return shlex.join(["moda" if program == shutil.which("moda") else program, *rest])
