"""Throughput of whole models: one training step's forward and backward, without data loading and optimizer.

What ``scripts/bench.py kernels --table training`` prints: MoDA against the paper's parameter-matched OLMo2 baseline, bf16
parameters, per-block ``torch.compile``, random tokens. The baseline is timed as OLMo-core builds it and with cuDNN attention.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config.schema import DepthKVSection, ModelConfig
from .model.block import NormPlacement

__all__ = ["StepTime", "TRAINING_MODELS", "time_steps", "training_table"]

log = logging.getLogger(__name__)

_SHAPE_700M: dict[str, Any] = dict(
    d_model=1024, n_heads=16, n_kv_heads=8, head_dim=64, ffn_hidden_size=4096, vocab_size=100278, pad_vocab_to=128
)

#: name -> (model, SDPA kernel of a plain model or None for PyTorch's own choice). The first is the baseline.
TRAINING_MODELS: dict[str, tuple[ModelConfig, SDPBackend | None]] = {
    "OLMo2 38 layers": (
        ModelConfig(n_layers=38, norm_placement=NormPlacement.reordered, depth_kv=None, **_SHAPE_700M),
        None,
    ),
    "OLMo2 38 layers, cuDNN": (
        ModelConfig(n_layers=38, norm_placement=NormPlacement.reordered, depth_kv=None, **_SHAPE_700M),
        SDPBackend.CUDNN_ATTENTION,
    ),
    "MoDA 36 layers, FFN KV": (
        ModelConfig(n_layers=36, norm_placement=NormPlacement.post, depth_kv=DepthKVSection(), **_SHAPE_700M),
        None,
    ),
}


@dataclass
class StepTime:
    """Times of one model's training steps (forward + backward)."""

    name: str
    params: int
    tokens: int
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def quantile(self, q: float) -> float:
        """A quantile of the step times, in milliseconds."""
        return torch.tensor(self.milliseconds, dtype=torch.float64).quantile(q).item()

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second at the median step time."""
        return self.tokens / self.quantile(0.5) * 1e3


@contextlib.contextmanager
def _sdpa(kernel: SDPBackend | None) -> Iterator[None]:
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        yield


def time_steps(
    name: str,
    config: ModelConfig,
    *,
    batch: int = 8,
    length: int = 4096,
    steps: int = 10,
    warmup: int = 3,
    compiled: bool = True,
    sdpa: SDPBackend | None = None,
    device: str = "cuda",
) -> StepTime:
    """Time ``steps`` training steps of a model.

    :param batch: sequences a step, of ``length`` tokens each.
    :param sdpa: force this SDPA kernel in a plain model.
    """
    model = config.transformer().build(init_device=device)
    model.init_weights(max_seq_len=length, device=torch.device(device))
    model = model.to(torch.bfloat16)
    if compiled:
        model.apply_compile()
    result = StepTime(name, model.num_params, batch * length)
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=generator).to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(warmup + steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with _sdpa(sdpa):
            output = model(tokens, labels=tokens, loss_reduction="mean")
            output.loss.backward()
        end.record()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if step >= warmup:
            result.milliseconds.append(start.elapsed_time(end))
    result.peak_bytes = torch.cuda.max_memory_allocated()
    del model, output, tokens
    gc.collect()
    torch.cuda.empty_cache()
    return result


def training_table(rounds: int = 2, **options: Any) -> list[StepTime]:
    """Time every model of :data:`TRAINING_MODELS`, all of them ``rounds`` times over: a GPU's clock changes under load."""
    rows: dict[str, StepTime] = {}
    for _ in range(rounds):
        for name, (config, sdpa) in TRAINING_MODELS.items():
            torch.compiler.reset()
            found = time_steps(name, config, sdpa=sdpa, **options)
            row = rows.setdefault(name, StepTime(name, found.params, found.tokens))
            row.milliseconds += found.milliseconds
            row.peak_bytes = max(row.peak_bytes, found.peak_bytes)
            log.info("%s: %.1f ms, %.0f tokens/s", name, found.quantile(0.5), found.tokens_per_second)
    return list(rows.values())
