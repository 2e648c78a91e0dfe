"""A training step of whole models: forward and backward, without data loading and optimizer.

MoDA against the paper's parameter-matched OLMo2 baseline, bf16 parameters, per-block ``torch.compile``, random tokens. The
baseline is timed as it is built here (with FlashAttention 4 where that is installed, as MoDA's sequence kernel is, and as
OLMo-core builds it elsewhere) and with OLMo-core's own attention and cuDNN. The models are those of ``configs/``.
"""

import argparse
import contextlib
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from moda.errors import UserError
from moda_kernels import sequence_kernel
from moda_kernels.benchmarks import results
from moda_kernels.benchmarks.registry import Benchmark, NotMeasured, require_gpu, results_option
from moda_kernels.benchmarks.timing import quantiles, seconds

#: name -> (configuration, overrides, SDPA kernel of a plain model or None for PyTorch's own choice). The first is the baseline.
MODELS: dict[str, tuple[str, tuple[str, ...], SDPBackend | None]] = {
    "OLMo2 38 layers": ("olmo2_700m.yaml", (), None),
    "OLMo2 38 layers, cuDNN": ("olmo2_700m.yaml", (), SDPBackend.CUDNN_ATTENTION),
    "MoDA 36 layers, FFN KV": ("moda_700m.yaml", (), None),
    "the same, fp8 slots": ("moda_700m.yaml", ("model.depth.slot_dtype=fp8",), None),
}


def time_steps(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    batch: int = 8,
    length: int = 4096,
    steps: int = 10,
    warmup: int = 3,
    compiled: bool = True,
    sdpa: SDPBackend | None = None,
) -> tuple[int, list[float], int, str]:
    """Time training steps of a configuration's model, on the GPU where there is one.

    :param batch: sequences per step, of ``length`` tokens each.
    :param sdpa: OLMo-core's own attention in a plain model, with this SDPA kernel.

    :returns: parameters, milliseconds of each step, the peak of the GPU's memory in bytes, and what the sequence's attention is.
    """
    from moda.config import load_config
    from moda.data import load_tokenizer
    from moda.model import transformer_config
    from moda.model.attention import DepthAttention, OperatorBackend

    run = load_config(config, overrides)
    vocab = run.model.vocab_size or load_tokenizer(run.data.tokenizer).config.vocab_size  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with patch.dict(os.environ, {} if sdpa is None else {"MODA_SEQUENCE_KERNEL": "cudnn"}):
        model = transformer_config(run.model, vocab).build(init_device=device.type)
    model.init_weights(max_seq_len=length, device=device)
    model = model.to(torch.bfloat16)
    if compiled:
        model.apply_compile()
    tokens = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        with contextlib.nullcontext() if sdpa is None else sdpa_kernel(sdpa):
            model(tokens, labels=tokens, loss_reduction="mean").loss.backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    for _ in range(warmup + steps):
        milliseconds.append(1e3 * seconds(step))
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    attention: Any = next(iter(model.blocks.values())).attention
    kernel = "SDPA" if sdpa is None else f"SDPA, {sdpa.name}"
    if isinstance(attention, DepthAttention) or isinstance(attention.backend, OperatorBackend):
        kernel = sequence_kernel(device, torch.bfloat16, attention.head_dim) or "none"
    return model.num_params, milliseconds[warmup:], peak, kernel


def training_table(
    configs: Path,
    names: Sequence[str] = tuple(MODELS),
    rounds: int = 2,
    batch: int = 8,
    length: int = 4096,
    **options: Any,
) -> list[dict[str, Any]]:
    """Time models of :data:`MODELS`, all of them ``rounds`` times over: a GPU's clock changes under load.

    :param configs: the folder of their configurations.
    :param names: which models; the first is what the others are compared with.

    :returns: one row per model.

    :raises UserError: where the folder lacks one of them.
    """
    missing = [file for file, _, _ in MODELS.values() if not (configs / file).is_file()]
    if missing:
        raise UserError(
            "--configs", f"a folder with {missing[0]}", str(configs), "the folder configs/ of a clone of this project"
        )
    times: dict[str, list[float]] = {name: [] for name in names}
    params, peaks, kernels = dict.fromkeys(names, 0), dict.fromkeys(names, 0), dict.fromkeys(names, "")
    for _ in range(rounds):
        for name in names:
            file, overrides, sdpa = MODELS[name]
            torch.compiler.reset()
            params[name], taken, peak, kernels[name] = time_steps(
                configs / file, overrides, batch=batch, length=length, sdpa=sdpa, **options
            )
            gc.collect()  # the model, before the next one is built
            torch.cuda.empty_cache()
            times[name] += taken
            peaks[name] = max(peaks[name], peak)
    rows = []
    for name in names:
        q = quantiles(times[name])
        speed = batch * length / q.median * 1e3
        rows.append({
            "model": name, "sequence_kernel": kernels[name],
            "params": params[name], "median_ms": round(q.median, 3), "p20_ms": round(q.p20, 3),
            "p80_ms": round(q.p80, 3), "tokens_per_second": round(speed),
            "over_baseline": round(quantiles(times[names[0]]).median / q.median, 4),
            "peak_gib": round(peaks[name] / 2**30, 2),
        })  # fmt: skip
    return rows


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    results_option(parser, root)
    parser.add_argument(
        "--configs",
        type=Path,
        default=root / "configs",
        help="folder of the models' configurations (default: %(default)s)",
    )
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="NAME",
        help=f"time these models only: {'; '.join(MODELS)}",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    require_gpu()
    path = args.out / "table_training.csv"
    if path.is_file() and set(args.models) != set(MODELS):
        raise NotMeasured(f"--models: part of a table would replace all of {path}; choose another --out")
    rows = training_table(args.configs, args.models)
    for row in rows:
        speed = f"{row['median_ms']:9.2f} ms {row['tokens_per_second']:8d} tokens/s {row['over_baseline']:.3f}"
        print(f"{row['model']:28s} {speed}")
    print(results.write(path, rows))


BENCHMARK = Benchmark("training", "a training step of whole models, against OLMo2", _add_options, _run)
