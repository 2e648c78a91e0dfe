"""Continue a text with a checkpoint.

A checkpoint is a run's folder (its newest whole checkpoint), a stepN folder of this project or of OLMo-core, or a folder that
`moda export` wrote.

Examples:
  %(prog)s runs/moda_demo "import os"
  %(prog)s runs/moda_demo/step160 "import os" --samples 3
  %(prog)s runs/moda_demo --interactive
  %(prog)s exported/moda_demo "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
"""

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from moda.errors import UserError
from moda.ranges import Count, NotNegative, Range, Seed

from ._options import add_model_options, from_arguments, new_parser, number

Probability = Annotated[float, Range(0, 1, above=True)]


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("checkpoint", help="folder of a checkpoint")
    p.add_argument("prompt", nargs="?", help="the text to continue")
    p.add_argument("--interactive", action="store_true", help="ask for one text after another, until Ctrl-D")
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
    group.add_argument(
        "--samples", type=number(Count), default=1, metavar="N", help="continuations; seed, seed + 1, ..."
    )
    add_model_options(p, ["float32", "bfloat16"])
    return p


def _asked() -> Iterator[str]:
    """Lines from the terminal, or from a pipe."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line:
            yield line


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from moda.generate import Sampling, generate, load_decoder, stream_text
    from moda_evals.model import choose_device

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moda").setLevel(logging.INFO)
    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    if (args.prompt is None) != args.interactive:
        raise UserError("PROMPT", "a text to continue, or else --interactive", args.prompt)
    sampling = from_arguments(Sampling, args)
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    decoder, tokenizer, context = load_decoder(args.checkpoint, device, dtype, args.tokenizer)
    if tokenizer is None:
        raise UserError("checkpoint", "a checkpoint that names its tokenizer", args.checkpoint, "or give --tokenizer")
    context = args.context_length or context

    def show(prompt: str, sampling: Sampling) -> None:
        ids = tokenizer.load().encode(prompt, add_special_tokens=False).ids
        tokens = generate(
            decoder, ids, sampling=sampling, max_new_tokens=args.max_new_tokens, stop=[tokenizer.config.eos_token_id],
            context_length=context,
        )  # fmt: skip
        counter = itertools.count()
        started = time.monotonic()
        print(prompt, end="", flush=True)
        try:
            for piece in stream_text((token for token, _ in zip(tokens, counter)), tokenizer):
                print(piece, end="", flush=True)
        finally:
            print()
        seconds, produced = time.monotonic() - started, next(counter)
        text = f"{produced} tokens in {seconds:.1f} s ({produced / max(seconds, 1e-9):.1f} tokens/s)"
        if produced < args.max_new_tokens:
            full = len(ids) + produced >= context
            ended = (
                f"the context of {context} tokens is full; --context-length N allows more" if full else "end of text"
            )
            text += f", stopped before {args.max_new_tokens}: {ended}"
        print(text, file=sys.stderr)

    for prompt in _asked() if args.interactive else [args.prompt]:
        for i in range(args.samples):
            if args.samples > 1:
                print(f"--- {i + 1} of {args.samples}")
            try:
                show(prompt, sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i))
            except UserError as e:  # of this prompt; the next one may do
                if not args.interactive:
                    raise
                print(f"error: {e}", file=sys.stderr)
                break
    return 0
