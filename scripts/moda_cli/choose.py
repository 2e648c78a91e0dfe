"""End the warm-up of a run with model.depth.read: learned.

A new run goes on from its checkpoint, in which layers read the slots of the largest scores.

Examples:
  %(prog)s runs/warmup/step300 runs/chosen
"""

import argparse
from pathlib import Path

from ._options import new_parser


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("source", metavar="SOURCE", help="a checkpoint or a run that was trained with scores of slots")
    p.add_argument("out", metavar="OUT", help="a new folder, for a run")
    return p


def run(args: argparse.Namespace) -> int:
    from moda.checkpoints import choose_checkpoint, choose_slots

    folder, out = choose_checkpoint(args.source), Path(args.out)
    chosen = choose_slots(folder, out)
    for layer, (slots, scores) in enumerate(zip(chosen.candidates, chosen.scores)):
        kept = chosen.slots.layers[layer]
        print(f"layer {layer}: " + (", ".join(f"{s} ({x:+.3f})" for s, x in zip(slots, scores) if s in kept) or "none"))
    print(f"{folder} goes on in {out}: moda train {out / 'config.yaml'}")
    return 0
