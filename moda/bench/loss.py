"""The loss of a language model's head, forward and backward: from logits, and in ways that never hold them.

Each variant is judged against fp64 on some of the rows, timed in turns with the others, and its peak memory is measured beyond
hidden states, head, their gradients and labels. What is not installed or cannot run is a row that says so.
"""

import argparse
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from olmo_core.nn.functional import cross_entropy_loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moda.model.loss import chunk_rows, linear_cross_entropy
from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, number, require_gpu, results_option
from moda_kernels.benchmarks.timing import quantiles, seconds
from moda_kernels.yardstick import verdicts

Z_LOSS = 1e-5

#: hidden ``[N, d]``, weight ``[rows, d]``, labels ``[N]``, vocabulary -> the mean loss.
Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _from_logits(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, z_loss: float = Z_LOSS) -> Tensor:
    logits = F.linear(hidden, weight)[:, :vocab]
    if logits.dtype == torch.float64:
        ce = F.cross_entropy(logits, labels, reduction="sum")
        return (ce + z_loss * logits.logsumexp(1).pow(2).sum()) / len(labels)
    ce, z = cross_entropy_loss(logits, labels, reduction="sum", compute_z_loss=True, z_loss_multiplier=z_loss)
    assert z is not None
    return (ce + z) / len(labels)


_compiled = torch.compile(_from_logits, dynamic=False)


def _chunk_loop(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """A loop over compiled, checkpointed chunks; autograd adds up the head's gradient in its own dtype."""
    total = hidden.new_zeros((), dtype=torch.float32)
    rows = chunk_rows(hidden.shape[1], len(weight), hidden.element_size(), hidden.is_cuda)
    for h, y in zip(hidden.split(rows), labels.split(rows)):
        part = checkpoint(_compiled, h, weight, y, vocab, use_reentrant=False)
        total = total + part * (len(y) / len(labels))
    return total


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, vocab=vocab, z_loss=Z_LOSS)[0] / len(labels)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    options = (None, None, -100, Z_LOSS, 0.0, "mean", None, False, torch.float32)
    # It has no padding: the head's last rows are cut off.
    return module.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight[:vocab], labels, *options)[0]


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(hidden, weight[:vocab], labels, options=options)  # type: ignore[attr-defined]


def _quack(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    module = importlib.import_module("quack.linear_cross_entropy")
    return module.chunked_linear_cross_entropy(hidden, weight[:vocab], labels)


#: name -> (loss, whether it has the z-loss). The first is what the others are compared with.
VARIANTS: dict[str, tuple[Loss, bool]] = {
    "logits, compiled": (_compiled, True),
    "moda": (_ours, True),
    "chunk loop, compiled": (_chunk_loop, True),
    "liger": (_liger, True),
    "torch": (_torch, False),
    "quack": (_quack, False),
}


def _gradients(f: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> dict[str, Tensor]:
    h, w = (x.detach().requires_grad_() for x in (hidden, weight))
    loss = f(h, w, labels, vocab)
    d_hidden, d_weight = torch.autograd.grad(loss, (h, w))
    return {"loss": loss.detach(), "hidden": d_hidden, "weight": d_weight}


def _errors(name: str, data: tuple[Any, ...]) -> dict[str, Any]:
    """Relative errors of loss and gradients, and of the yardstick's plain computation; parity first of all."""
    f, has_z = VARIANTS[name]
    plain = functools.partial(_from_logits, z_loss=Z_LOSS if has_z else 0.0)
    truth = _gradients(plain, data[0].double(), data[1].double(), *data[2:])
    judged = verdicts(_gradients(f, *data), _gradients(plain, *data), truth)
    row: dict[str, Any] = {"status": "ok" if all(v.passed for v in judged) else "parity failed"}
    for v in judged:
        row |= {f"{v.name}_error": f"{v.error:.2e}", f"{v.name}_plain_error": f"{v.plain_error:.2e}"}
    return row


def _step(name: str, data: tuple[Any, ...]) -> None:
    _gradients(VARIANTS[name][0], *data)


def loss_table(
    tokens: int, vocab: int, rows: int, d_model: int, *, device: str = "cuda", checked: int = 2048, repeats: int = 20
) -> list[dict[str, Any]]:
    """One row per variant.

    :param rows: of the head, ``vocab`` and padding. :param checked: tokens on which errors are measured.
    """
    g = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = dict(generator=g, device=device)
    hidden = torch.randn(tokens, d_model, **options).to(torch.bfloat16)
    weight = (torch.randn(rows, d_model, **options) / d_model**0.5).to(torch.bfloat16)
    labels = torch.randint(0, vocab, (tokens,), **options)
    data = (hidden, weight, labels, vocab)
    gradients = hidden.nbytes + weight.nbytes
    columns: tuple[str, ...] = ("status", "median_ms", "p20_ms", "p80_ms", "over_logits", "extra_mib")
    columns += tuple(f"{x}{y}_error" for x in ("loss", "hidden", "weight") for y in ("", "_plain"))
    out: dict[str, dict[str, Any]] = {name: dict.fromkeys(columns, "") for name in VARIANTS}
    for name, row in out.items():
        torch.compiler.reset()
        try:
            row |= _errors(name, (hidden[:checked], weight, labels[:checked], vocab))
            if row["status"] == "ok" and device != "cpu":
                _step(name, data)
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                _step(name, data)
                row["extra_mib"] = round((torch.cuda.max_memory_allocated() - before - gradients) / 2**20)
        except (ImportError, AttributeError) as e:
            row["status"] = f"not here: {e}"
        except Exception as e:  # a variant that fails is a result
            row["status"] = f"failed: {type(e).__name__}: {e}".splitlines()[0][:200]
    running = [name for name, row in out.items() if row["status"] == "ok"]
    times: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(repeats + 3):
        for name in running:
            taken = 1e3 * seconds(functools.partial(_step, name, data))
            if turn >= 3:
                times[name].append(taken)
    for name in running:
        q = quantiles(times[name])
        out[name] |= {"median_ms": round(q.median, 3), "p20_ms": round(q.p20, 3), "p80_ms": round(q.p80, 3)}
        if running[0] == next(iter(VARIANTS)):
            out[name]["over_logits"] = round(q.median / quantiles(times[running[0]]).median, 3)
    shape = {"tokens": tokens, "vocab": vocab, "rows": rows, "d_model": d_model}
    return [{"variant": name, "z_loss": VARIANTS[name][1], **shape, **row} for name, row in out.items()]


def _add_options(parser: argparse.ArgumentParser, root: Any) -> None:
    results_option(parser, root)
    parser.add_argument("--tokens", type=number(int, 1), default=32_768, help="default: %(default)s")


def _run(args: argparse.Namespace) -> None:
    require_gpu()
    table = []
    for d_model in (1024, 1536):
        table += loss_table(args.tokens, 100_278, 100_352, d_model)
    for row in table:
        figures = f"{row['median_ms']!s:>9} ms {row['extra_mib']!s:>7} MiB  weight error {row['weight_error']}"
        print(f"{row['d_model']:5d} {row['variant']:22s} {figures}  {row['status']}")
    print(results.write(args.out / "table_loss.csv", table))


BENCHMARK = Benchmark("loss", "the loss without logits, against other ways to compute it", _add_options, _run)
