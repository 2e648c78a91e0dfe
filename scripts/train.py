"""Train a model from a configuration file.

torchrun scripts/train.py configs/moda_1.5b.yaml [key=value ...]     several processes
python scripts/train.py configs/moda_demo.yaml [key=value ...]       one process
"""

from __future__ import annotations

import argparse
import os
import sys

# Read when torch loads. Large CPU tensors (the logits) go into huge pages: page faults otherwise take longer than the
# arithmetic. Threads that wait for each other sleep: on a busy machine they would take the cores from those that work.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/moda_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and its sizes, and exit"
    )
    args = parser.parse_intermixed_args()

    from moda.config import load_config
    from moda.errors import UserError
    from moda.train.run import plan, print_plan, train
    from moda_evals.in_loop import check_downstream, downstream_callbacks

    try:
        config = load_config(args.config, args.overrides)
        check_downstream(config)
        if args.dry_run:
            print_plan(plan(config))
            return 0
        return train(config, downstream_callbacks).exit_code
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
