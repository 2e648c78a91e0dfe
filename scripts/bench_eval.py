"""Speed of downstream scoring at a model's shape: as scripts/eval.py does it (by length, contexts shared), in batches padded to
the longest request, and a plain forward pass.

python scripts/bench_eval.py configs/moda_700m.yaml [--task hellaswag] [--limit N] [--output results.json]
python scripts/bench_eval.py configs/moda_700m.yaml --save-requests hellaswag.json.gz      (then --requests elsewhere)

Weights are random: they do not change the time. Tokens are those of the packaged GPT-NeoX tokenizer.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration whose model section is used")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--batch-size", type=int, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", help="requests saved by --save-requests, instead of the task's data")
    parser.add_argument("--save-requests", metavar="FILE", help="only write the requests and stop")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    logging.getLogger("olmo_core").setLevel(logging.ERROR)

    import torch

    from moda.config import load_config
    from moda.config.schema import TokenizerSection
    from moda.data import load_tokenizer
    from moda.errors import UserError
    from moda_evals.benchmark import benchmark, load_spans, save_spans
    from moda_evals.downstream import fit
    from moda_evals.model import ScoredModel, TextTokenizer
    from moda_evals.tasks import load_questions, resolve_tasks
    from moda_kernels.benchmarks.provenance import commit

    try:
        if args.requests:
            spans = load_spans(Path(args.requests))
        else:
            task = resolve_tasks([args.task])[0]
            tokenizer = TextTokenizer(load_tokenizer(TokenizerSection("gpt-neox")))
            questions = load_questions(task, tokenizer, args.limit)
            spans = [s for q in fit(task, questions, 1 << 20, False)[0] for s in q]
        if args.save_requests:
            save_spans(spans, Path(args.save_requests))
            print(f"{len(spans)} requests: {args.save_requests}")
            return 0
        config = load_config(args.config, args.overrides)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        built = config.model.transformer(config.model.vocab_size or 50280)
        module = built.build(init_device="cpu")
        module.init_weights(max_seq_len=config.train.sequence_length, device=torch.device("cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = ScoredModel(
            label=config.name, path=args.config, kind="moda", module=module.to(device=device, dtype=dtype).eval(),
            head=module.lm_head, tokenizer_info=None, context_length=1 << 20,
            vocab_size=built.vocab_size - built.lm_head.padding,
        )  # fmt: skip
        found = benchmark(model, spans, batch_tokens=args.batch_size, repeats=args.repeats)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    found.update(
        config=config.name,
        task=args.task,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        dtype=str(dtype),
        torch=torch.__version__,
        commit=commit(),
    )
    speed = found["tokens_per_second"]
    print(
        f"{found['requests']} requests of {args.task}, {found['tokens']:,} tokens, {found['tokens_run']:,} of them run, "
        f"longest {found['longest']}"
    )
    for name, meaning in (
        ("scored", "as eval.py does"), ("padded", "padded to the longest"), ("scored_run", "as eval.py does, run"),
        ("forward", "plain forward pass"),
    ):  # fmt: skip
        print(f"  {meaning:24} {speed[name]:12,.0f} tokens/s")
    print(f"  eval.py over padded: {found['scored_over_padded']:.2f}; run over plain: {found['run_over_forward']:.2f}")
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
