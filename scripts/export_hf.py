"""Export a checkpoint to a Hugging Face folder, or import one back.

python scripts/export_hf.py CHECKPOINT OUT [--dtype bfloat16]
python scripts/export_hf.py --import FOLDER OUT
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint (stepN), or with --import an exported folder")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--import", dest="back", action="store_true", help="from an exported folder to a checkpoint")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("olmo_core").setLevel(logging.ERROR)

    import torch

    from moda.checkpoints import open_checkpoint
    from moda.errors import UserError
    from moda.hf import write_checkpoint, write_export

    try:
        if args.back:
            run = write_checkpoint(Path(args.source), Path(args.out))
            print(f"{run.name}: imported to {args.out}")
        else:
            fields = write_export(open_checkpoint(Path(args.source)), Path(args.out), getattr(torch, args.dtype))
            print(f"exported to {args.out}: {fields.num_hidden_layers} layers, vocabulary {fields.vocab_size:,}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
