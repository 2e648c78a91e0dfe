"""The same small model trained 200 steps with every backend on the same data: losses agree within what bf16 itself does.

Truth is an fp32 run. A bf16 run with the reference backend differs from it by ``noise`` (root mean square over steps);
``fused`` and ``split`` may differ from the truth by at most twice that.
"""

from __future__ import annotations

import pydoc_data.topics
from typing import Dict, List

import pytest
import torch

from moda.config.schema import DepthKVSection, ModelConfig

STEPS, BATCH, LENGTH = 200, 8, 256


def text_bytes() -> torch.Tensor:
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(backend: str, dtype: torch.dtype) -> List[float]:
    """Losses of 200 AdamW steps with fp32 parameters and arithmetic under autocast to ``dtype``."""
    config = ModelConfig(
        d_model=256, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=64, ffn_hidden_size=512, vocab_size=256,
        norm_placement="post", depth_kv=DepthKVSection(), attention_backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip
    device = torch.device("cuda")
    model = config.transformer().build(init_device="cuda")
    model.init_weights(max_seq_len=LENGTH, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = text_bytes()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        starts = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([data[s : s + LENGTH + 1] for s in starts]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = model(batch[:, :-1].contiguous(), labels=batch[:, 1:].contiguous())
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.detach())
    return torch.stack(losses).tolist()


def distance(a: List[float], b: List[float]) -> float:
    return (torch.tensor(a) - torch.tensor(b)).square().mean().sqrt().item()


def compare() -> Dict[str, List[float]]:
    runs = {"fp32": train("reference", torch.float32)}
    for backend in ("reference", "fused", "split"):
        runs[backend] = train(backend, torch.bfloat16)
    return runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_backends_train_alike() -> None:
    runs = compare()
    assert runs["fp32"][-1] < 0.6 * runs["fp32"][0], "the run learns"
    noise = distance(runs["reference"], runs["fp32"])
    for backend in ("fused", "split"):
        assert distance(runs[backend], runs["fp32"]) <= 2 * noise, (
            backend,
            distance(runs[backend], runs["fp32"]),
            noise,
        )
