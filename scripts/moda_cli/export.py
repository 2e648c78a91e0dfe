"""Write a checkpoint as a Hugging Face folder, or read such a folder back into a checkpoint.

Examples:
  %(prog)s runs/moda_demo/step480 exported/moda_demo --dtype bfloat16
  %(prog)s --import exported/moda_demo runs/imported/step0
"""

import argparse
import logging
from pathlib import Path

from ._options import new_parser


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("source", metavar="SOURCE", help="a checkpoint (stepN), or with --import an exported folder")
    p.add_argument("out", metavar="OUT", help="a new folder")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    p.add_argument("--import", dest="back", action="store_true", help="read an exported folder into a checkpoint")
    return p


def run(args: argparse.Namespace) -> int:
    import torch

    from moda.checkpoints import open_checkpoint
    from moda.hf import write_checkpoint, write_export

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    if args.back:
        config = write_checkpoint(Path(args.source), Path(args.out))
        print(f"{config.name}: imported to {args.out}")
    else:
        model = write_export(open_checkpoint(Path(args.source)), Path(args.out), getattr(torch, args.dtype))
        print(f"exported to {args.out}: {model.n_layers} layers, vocabulary {model.vocab_size:,}")
    return 0
