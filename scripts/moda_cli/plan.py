"""Check a configuration and print it resolved, with parameters, FLOPs per token, memory, steps and data.

Further rows say which microbatch, checkpointing and sharding the GPUs allow, and how long the run takes.

Examples:
  %(prog)s configs/moda_700m.yaml train.max_tokens=2e9
  %(prog)s configs/moda_1.5b.yaml --gpus 64 --memory 80 --mfu 0.4
"""

import argparse
from typing import Annotated

from moda.ranges import Range

from ._options import add_config_arguments, new_parser, number

Fraction = Annotated[float, Range(0, 1, above=True)]


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    add_config_arguments(p)
    p.add_argument(
        "--gpus",
        type=number(Annotated[int, Range(1, 10**6)]),
        metavar="N",
        help="plan for N GPUs (default: one, or torchrun's)",
    )
    p.add_argument(
        "--memory", type=number(Annotated[float, Range(0, 10**6, above=True)]), metavar="GiB",
        help="memory of a GPU (default: this machine's, or 80)",
    )  # fmt: skip
    p.add_argument(
        "--mfu", type=number(Fraction), default=0.35, metavar="SHARE", help="assumed share of the peak FLOP/s"
    )
    p.add_argument(
        "--peak", type=number(Annotated[float, Range(0, 10**9, above=True)]), default=989, metavar="TFLOPS",
        help="a GPU's peak: the default is an H100's, bf16",
    )  # fmt: skip
    return p


def run(args: argparse.Namespace) -> int:
    from moda.config import load_config
    from moda.train.memory import a_gpu
    from moda.train.run import plan, print_plan
    from moda_evals.in_loop import check_downstream

    config = load_config(args.config, args.overrides)
    check_downstream(config)
    p = plan(config, args.gpus, None if args.memory is None else a_gpu(args.memory))
    print_plan(p, p.proposal() + p.duration(args.mfu, args.peak * 1e12))
    return 0
