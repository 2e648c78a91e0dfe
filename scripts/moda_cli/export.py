"""Write a checkpoint as a Hugging Face folder, or read such a folder back into a checkpoint.

Examples:
  %(prog)s runs/moda_demo exported/moda_demo --dtype bfloat16
  %(prog)s --import exported/moda_demo runs/imported/step0
"""

import argparse
import logging
from pathlib import Path

from ._options import new_parser


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("source", metavar="SOURCE", help="a checkpoint or a run, or with --import an exported folder")
    p.add_argument("out", metavar="OUT", help="a new folder")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    p.add_argument("--results", default="results/eval", metavar="FOLDER", help="of `moda eval`, for the model card")
    p.add_argument("--import", dest="back", action="store_true", help="read an exported folder into a checkpoint")
    return p


def run(args: argparse.Namespace) -> int:
    import torch

    from moda.checkpoints import choose_checkpoint, open_checkpoint
    from moda.hf import write_checkpoint, write_export
    from moda_evals.model import checkpoint_label
    from moda_evals.report import tables_of

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moda").setLevel(logging.INFO)
    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    if args.back:
        config = write_checkpoint(Path(args.source), Path(args.out))
        print(f"{config.name}: imported to {args.out}")
    else:
        checkpoint = open_checkpoint(choose_checkpoint(args.source))
        results = tables_of(Path(args.results) / checkpoint_label(checkpoint.folder), checkpoint.folder)
        model = write_export(checkpoint, Path(args.out), getattr(torch, args.dtype), results)
        print(f"exported to {args.out}: {model.n_layers} layers, vocabulary {model.vocab_size:,}")
    return 0
