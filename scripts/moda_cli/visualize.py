"""Show what checkpoints attend to, sequence and depth, and what their layers hold, on a text.

Writes index.html with attention maps, depth's share by layer, head and slot, attention sinks, logit lens and cosines between
layers; each figure as PNG, and the figures' numbers as CSV. Several checkpoints, such as a baseline, are shown side by side.

Examples:
  %(prog)s runs/moda_demo/step480 --text "import os" --out look
  %(prog)s runs/moda_demo/step480 runs/olmo2_demo/step480 --file README.md --tokens 64 --layers 0,2,3
"""

import argparse
from pathlib import Path

from moda.ranges import Count

from ._options import add_model_options, new_parser, number


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,2,3, got {text}")
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("checkpoint", nargs="+", help="folders of runs, checkpoints or exports")
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text")
    given.add_argument("--file", metavar="FILE", help="a file with the text")
    p.add_argument("--out", default="visualize", metavar="FOLDER", help="where the page goes")
    p.add_argument("--tokens", type=number(Count), default=64, metavar="N", help="look at the first N tokens")
    p.add_argument(
        "--layers", type=_numbers, metavar="0,2,...", help="layers of the attention maps (default: six of them)"
    )
    p.add_argument(
        "--heads", type=_numbers, metavar="0,1,...", help="heads of the attention maps (default: four of them)"
    )
    add_model_options(p, ["float32", "bfloat16"])
    return p


def run(args: argparse.Namespace) -> int:
    import torch

    from moda.errors import UserError
    from moda.files import check_writable
    from moda.generate import load_decoder
    from moda.visualize import look
    from moda.visualize.draw import write_page
    from moda_evals.model import choose_device

    try:
        text = args.text if args.file is None else Path(args.file).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError("--file", "a readable UTF-8 file", args.file, str(e)) from None
    check_writable("--out", Path(args.out), folder=True)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    looks = []
    for folder in args.checkpoint:
        decoder, tokenizer, context = load_decoder(folder, device, dtype, args.tokenizer)
        if tokenizer is None:
            raise UserError("checkpoint", "a checkpoint that names its tokenizer", folder, "or give --tokenizer")
        encoder = tokenizer.load()
        ids = encoder.encode(text, add_special_tokens=False).ids[: min(args.tokens, args.context_length or context)]
        looks.append(look(decoder, ids, [encoder.decode([i]) for i in ids], "/".join(Path(folder).parts[-2:])))
    shapes = [(len(x.weights), x.weights[0].shape[0]) for x in looks]
    for option, given, most in zip(("--layers", "--heads"), (args.layers, args.heads), map(max, zip(*shapes))):
        if given is not None and max(given) >= most:
            raise UserError(option, f"numbers below {most}", max(given))
    figures = write_page(looks, Path(args.out), args.layers, args.heads)
    print(f"{len(figures)} figures and four tables: {Path(args.out) / 'index.html'}")
    return 0
