"""Speed of downstream scoring at a model's shape: as scripts/eval.py does it (batches by length, contexts shared), in batches
padded to the task's longest request, and a plain forward pass.

python scripts/bench.py eval configs/moda_700m.yaml [--task hellaswag] [--limit N] [--output scoring_speed.csv]
python scripts/bench.py eval configs/moda_700m.yaml --save-requests hellaswag.json.gz      (then --requests elsewhere)

Weights are random: they do not change the time. Tokens are those of the packaged GPT-NeoX tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number
from moda_kernels.benchmarks.timing import quantiles, seconds

if TYPE_CHECKING:
    from .model import ScoredModel
    from .scoring import Span

#: What each way is called in print.
WAYS = {
    "scored": "as eval.py does", "padded": "padded to the longest", "scored_run": "as eval.py does, run",
    "forward": "plain forward pass",
}  # fmt: skip


def save_spans(spans: Sequence[Span], path: Path) -> None:
    """Keep requests, so that a machine without the task data can run them."""
    with gzip.open(path, "wt") as f:
        json.dump([[s.ids, s.start, s.targets] for s in spans], f)


def load_spans(path: Path) -> list[Span]:
    """What :func:`save_spans` wrote."""
    from .scoring import Span

    with gzip.open(path, "rt") as f:
        return [Span(tuple(ids), start, tuple(targets)) for ids, start, targets in json.load(f)]


def _padded_to_longest(model: ScoredModel, spans: Sequence[Span], batch_tokens: int) -> list[float]:
    """The way of OLMo-core's evaluator at its simplest: data order, every batch as wide as the longest request of the task."""
    from .shared_prefix import Tree, lay_out

    width = max(len(s.ids) for s in spans)
    size = max(1, batch_tokens // width)
    sums: list[float] = []
    for at in range(0, len(spans), size):
        chosen = spans[at : at + size]
        index = torch.tensor([(row, s.start + i, t) for row, s in enumerate(chosen) for i, t in enumerate(s.targets)])
        flat = model.token_log_probs(lay_out([Tree(s.ids, ((),)) for s in chosen], width), *index.unbind(1)).cpu()
        sums += [part.sum().item() for part in flat.split([len(s.targets) for s in chosen])]
    return sums


def benchmark(
    model: ScoredModel, spans: Sequence[Span], *, batch_tokens: int | None = None, repeats: int = 3
) -> dict[str, Any]:
    """Medians of both ways over the same requests, checked against each other, and of a plain forward pass.

    :returns: :class:`Quantiles` of each way's ``seconds``, and tokens per second, padding not counted: ``scored`` and
        ``padded`` in tokens of the requests, ``scored_run`` in tokens that ran through the model (a shared context once),
        ``forward`` for all logits of full batches as long as the task's longest request; and the ratios ``scored`` to
        ``padded`` and ``scored_run`` to ``forward``.

    :raises RuntimeError: where the two ways disagree.
    """
    from .scoring import default_batch_tokens, score

    batch_tokens = batch_tokens or default_batch_tokens(model.device)
    tokens = sum(len(s.ids) for s in spans)
    width = max(len(s.ids) for s in spans)
    score(model, spans[:: max(1, len(spans) // 256)], batch_tokens=batch_tokens)
    scores = score(model, spans, batch_tokens=batch_tokens)
    truth = _padded_to_longest(model, spans, batch_tokens)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.02
    differences = [abs(float(a.sum()) - b) / (1 + abs(b)) for a, b in zip(scores.log_probs, truth)]
    worst = max(differences)
    if not all(d <= tolerance for d in differences):  # so that NaN does not pass
        raise RuntimeError(f"the two ways of batching disagree by {worst:.2e} (relative), allowed {tolerance}")
    ids = torch.randint(0, model.vocab_size, (max(1, batch_tokens // width), width), device=model.device)
    model.logits(ids)
    ways: dict[str, Callable[[], Any]] = {
        "scored": lambda: score(model, spans, batch_tokens=batch_tokens),
        "padded": lambda: _padded_to_longest(model, spans, batch_tokens),
        "forward": lambda: model.logits(ids),
    }
    taken = {name: quantiles([seconds(run) for _ in range(max(3, repeats))]) for name, run in ways.items()}
    median = {name: q.median for name, q in taken.items()}
    run = scores.tokens - scores.padded
    speeds = {
        "scored": tokens / median["scored"],
        "scored_run": run / median["scored"],
        "padded": tokens / median["padded"],
        "forward": ids.numel() / median["forward"],
    }
    return {
        "requests": len(spans),
        "tokens": tokens,
        "tokens_run": run,
        "padding": scores.padded / scores.tokens,
        "longest": width,
        "batch_tokens": batch_tokens,
        "worst_difference": worst,
        "seconds": taken,
        "tokens_per_second": speeds,
        "scored_over_padded": median["padded"] / median["scored"],
        "run_over_forward": speeds["scored_run"] / speeds["forward"],
    }


def _load_requests(args: argparse.Namespace) -> list[Span]:
    from moda.config.schema import TokenizerSection
    from moda.data import load_tokenizer

    from .downstream import fit
    from .model import TextTokenizer
    from .tasks import load_questions, resolve_tasks

    if args.requests:
        return load_spans(Path(args.requests))
    task = resolve_tasks([args.task])[0]
    questions = load_questions(task, TextTokenizer(load_tokenizer(TokenizerSection("gpt-neox"))), args.limit)
    return [s for question in fit(task, questions, 1 << 20, False)[0] for s in question]


def _build(args: argparse.Namespace) -> ScoredModel:
    from moda.config import load_config
    from moda.model import transformer_config

    from .model import ScoredModel, choose_device

    config = load_config(args.config, args.overrides)
    device = choose_device(None)
    built = transformer_config(config.model, config.model.vocab_size or 50280)
    module = built.build(init_device="cpu")
    module.init_weights(max_seq_len=config.train.sequence_length, device=torch.device("cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return ScoredModel(
        label=config.name, path=args.config, kind="moda", module=module.to(device=device, dtype=dtype).eval(),
        head=module.lm_head, tokenizer_info=None, context_length=1 << 20,
        vocab_size=built.vocab_size - built.lm_head.padding,
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    logging.getLogger("olmo_core").setLevel(logging.ERROR)
    spans = _load_requests(args)
    if args.save_requests:
        save_spans(spans, Path(args.save_requests))
        print(f"{len(spans)} requests: {args.save_requests}")
        return
    model = _build(args)
    measured = benchmark(model, spans, batch_tokens=args.batch_size, repeats=args.repeats)
    summary = "{requests} requests of {task}, {tokens:,} tokens, {tokens_run:,} of them run, longest {longest}"
    print(summary.format(task=args.task, **measured))
    for way, meaning in WAYS.items():
        print(f"  {meaning:24} {measured['tokens_per_second'][way]:12,.0f} tokens/s")
    print(
        "  eval.py over padded: {scored_over_padded:.2f}; run over plain: {run_over_forward:.2f}".format_map(measured)
    )
    if args.output:
        measured.update(config=model.label, task=args.task, dtype=str(model.dtype))
        taken, speeds = measured.pop("seconds"), measured.pop("tokens_per_second")
        rows = []  # one for each of WAYS
        for way, speed in speeds.items():
            q = taken[way.removesuffix("_run")]
            spread = {f"seconds_{name}": getattr(q, name) for name in ("median", "p20", "p80")}
            rows.append({"way": way, **spread, "repeats": q.repeats, "tokens_per_second": speed, **measured})
        print(results.write(Path(args.output), rows))


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    del root
    parser.add_argument("config", help="a configuration whose model section is used")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--limit", type=number(int, 1), help="only the first N questions")
    parser.add_argument("--batch-size", type=number(int, 1), metavar="TOKENS")
    parser.add_argument("--repeats", type=number(int, 1), default=3)
    parser.add_argument("--requests", help="requests saved by --save-requests, instead of the task's data")
    parser.add_argument("--save-requests", metavar="FILE", help="only write the requests and stop")
    parser.add_argument("--output", metavar="FILE", help="the CSV to write")


BENCHMARK = Benchmark("eval", "scoring of downstream tasks, beside a plain forward pass", _add_options, _run)
