"""A sequence cut into chunks that see the earlier ones, with depth slots, against the whole sequence, on every backend."""

from __future__ import annotations

import os

import pytest
import torch

from moda_kernels import ATTENTION, FFN, DepthStream, depth_attention, depth_write
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.yardstick import report, verdicts
from tests.kernels.layouts import layout

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
B, R, T, HQ, HK, D = (2, 4, 128, 8, 2, 64) if GPU else (1, 3, 16, 4, 2, 16)
NAMES = ("q", "k", "v", "depth_k", "depth_v")


def in_chunks(backend: str, q: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
    k, v, depth_k, depth_v = kv

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(B * R, T, *x.shape[2:])

    def chunks(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (R, T)).transpose(0, 1).contiguous()

    stream = DepthStream(layout(2), backend)
    order = stream.start(q.device)
    for kind in (ATTENTION, FFN):
        order = depth_write(order, rows(depth_k[kind]), rows(depth_v[kind]), stream.layer_rows[0], kind)
    past = chunks(k), chunks(v), list(range(R))
    out, _ = depth_attention(rows(q), rows(k), rows(v), order, stream.layer_rows[1], past=past)
    return out.view(q.shape)


@pytest.mark.parametrize("backend", ["reference", "fused", "split"])
def test_chunks_that_see_the_past_are_the_whole(backend: str) -> None:
    if backend != "reference":
        pytest.importorskip("triton")
    dtype = torch.bfloat16 if GPU else torch.float32 if backend == "reference" else torch.float16
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, R * T, HQ, D), *[(B, R * T, HK, D)] * 2, *[(2, B, R * T, HK, D)] * 2]
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator).to(DEVICE, dtype)

    def results(wide: torch.dtype, chunked: bool) -> dict[str, torch.Tensor | None]:
        leaves = [x.to(wide).requires_grad_() for x in drawn]
        out = in_chunks(backend, *leaves) if chunked else naive_attention(*leaves)[0]
        return dict(zip(("out", *NAMES), (out, *torch.autograd.grad(out, leaves, grad.to(wide)))))

    judged = verdicts(results(dtype, True), results(dtype, False), results(torch.float64, False))
    assert len(judged) == 6 and all(v.passed for v in judged), report(judged)
