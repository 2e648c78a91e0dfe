"""Continue a text with a checkpoint.

A checkpoint is a stepN folder of this project or of OLMo-core, or a folder that `moda export` wrote.

Examples:
  %(prog)s runs/moda_demo/step480 "import os"
  %(prog)s exported/moda_demo "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
"""

import argparse
import itertools
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

from moda.errors import UserError
from moda.ranges import Count, NotNegative, Range, Seed

from ._options import add_model_options, from_arguments, new_parser, number

Probability = Annotated[float, Range(0, 1, above=True)]


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("checkpoint", help="folder of a checkpoint")
    p.add_argument("prompt", help="the text to continue")
    p.add_argument("--max-new-tokens", type=number(Count), default=100, metavar="N", help="stop after N tokens")
    group = p.add_argument_group("sampling")
    group.add_argument(
        "--temperature", type=number(NotNegative), default=0.8, metavar="X", help="0: always the likeliest token"
    )
    group.add_argument("--top-k", type=number(Count), metavar="N", help="choose among the N likeliest tokens")
    group.add_argument(
        "--top-p", type=number(Probability), default=1.0, metavar="X", help="among those that reach probability X"
    )
    group.add_argument("--seed", type=number(Seed), metavar="N", help="the same seed gives the same text")
    add_model_options(p, ["float32", "bfloat16"])
    return p


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from moda.generate import Sampling, generate, load_decoder, stream_text
    from moda_evals.model import choose_device

    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    sampling = from_arguments(Sampling, args)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    decoder, tokenizer, context = load_decoder(Path(args.checkpoint), device, dtype, args.tokenizer)
    if tokenizer is None:
        raise UserError("checkpoint", "a checkpoint that names its tokenizer", args.checkpoint, "or give --tokenizer")
    tokens = generate(
        decoder, tokenizer.load().encode(args.prompt, add_special_tokens=False).ids, sampling=sampling,
        max_new_tokens=args.max_new_tokens, stop=[tokenizer.config.eos_token_id],
        context_length=args.context_length or context,
    )  # fmt: skip
    counter = itertools.count()
    started = time.monotonic()
    print(args.prompt, end="", flush=True)
    try:
        for piece in stream_text((token for token, _ in zip(tokens, counter)), tokenizer):
            print(piece, end="", flush=True)
    finally:
        print()
    seconds, produced = time.monotonic() - started, next(counter)
    print(f"{produced} tokens in {seconds:.1f} s ({produced / max(seconds, 1e-9):.1f} tokens/s)", file=sys.stderr)
    return 0
