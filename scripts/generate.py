"""Continue a text with a checkpoint.

python scripts/generate.py CHECKPOINT "Once upon a time" [--max-new-tokens 100] [--temperature 0.8] [--top-p 0.95]

A checkpoint is a stepN folder of this project or of OLMo-core, or an export of scripts/export_hf.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--tokenizer", help="tokenizer.json where the checkpoint's own cannot be reached")
    parser.add_argument("--context-length", type=int, help="allow more tokens than the model was trained on")
    parser.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args(argv)
    logging.getLogger("olmo_core").setLevel(logging.ERROR)

    import torch

    from moda.errors import UserError
    from moda.generate import Sampling, generate, load_decoder, stream_text

    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        decoder, tokenizer, context = load_decoder(Path(args.checkpoint), device, dtype, args.tokenizer)
        if tokenizer is None:
            raise UserError(
                "checkpoint", "a checkpoint that names its tokenizer", args.checkpoint, "or give --tokenizer"
            )
        ids = tokenizer.load().encode(args.prompt, add_special_tokens=False).ids
        print(args.prompt, end="", flush=True)
        started, count = time.monotonic(), 0

        def counted():  # type: ignore[no-untyped-def]
            nonlocal count
            stop = [tokenizer.config.eos_token_id]
            length = args.context_length or context
            for token in generate(
                decoder, ids, max_new_tokens=args.max_new_tokens, sampling=sampling, stop=stop, context_length=length
            ):
                count += 1
                yield token

        for piece in stream_text(counted(), tokenizer):
            print(piece, end="", flush=True)
        seconds = time.monotonic() - started
        print()
        print(f"{count} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f} tokens/s)", file=sys.stderr)
    except UserError as e:
        print(f"\nerror: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
