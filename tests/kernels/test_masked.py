"""Attention under a given mask, alone and with the depth stream, against fp64."""

from __future__ import annotations

import pytest
import torch

from moda_kernels import ATTENTION, FFN, DepthStream, depth_attention, depth_write
from moda_kernels.depth.masked import masked_attention
from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.yardstick import compare
from tests.kernels.layouts import LISTS, layout

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def draw(*shape: int, device: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def some_mask(B: int, T: int, device: str) -> torch.Tensor:
    """Causal with holes; every query sees itself."""
    holes = torch.rand(B, T, T, generator=torch.Generator().manual_seed(9)) < 0.6
    return (holes | torch.eye(T, dtype=torch.bool)).tril().to(device)


def plain(q, k, v, mask):
    """Unfused PyTorch in the tensors' dtype: output and LSE."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask[:, None], float("-inf"))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v), wide.logsumexp(-1)


@pytest.mark.parametrize("T", [1, 33, 40, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_masked_attention(device: str, dtype: torch.dtype, T: int) -> None:
    q, k, v = (draw(2, T, h, 64, device=device, dtype=dtype, seed=s) for s, h in enumerate((6, 2, 2)))
    mask = some_mask(2, T, device)
    truth, low = plain(q.double(), k.double(), v.double(), mask), plain(q, k, v, mask)
    out, lse = masked_attention(q, k, v, mask)
    assert lse.dtype == torch.float32
    for verdict in (compare("out", out, low[0], truth[0]), compare("lse", lse, low[1], truth[1])):
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize(
    "device, backend",
    [("cpu", "reference"), *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("fused", "split"))],
)
@pytest.mark.parametrize("pattern", ["all", "every-second"])
def test_causal_mask_is_the_causal_operator(device: str, backend: str, pattern: str) -> None:
    """A layer that reads the slots of two layers, with its causal mask written out."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, q_depth = (draw(2, 64, 4, 64, device=device, dtype=dtype, seed=s) for s in (0, 1))
    k, v = (draw(2, 64, 2, 64, device=device, dtype=dtype, seed=s) for s in (2, 3))
    slots = draw(2, 4, 2, 64, 2, 64, device=device, dtype=dtype, seed=4)
    case = layout(3, choose=LISTS.get(pattern, tuple))
    stream = DepthStream(case, backend)
    mask = torch.ones(64, 64, dtype=torch.bool, device=device).tril().expand(2, -1, -1)
    with torch.no_grad():
        order = stream.start(q.device)
        first, order = depth_attention(q, k, v, order, stream.layer_rows[0], mask=mask)
        for i, (layer, kind) in enumerate((layer, kind) for layer in (0, 1) for kind in (ATTENTION, FFN)):
            if case.written_slot(layer, kind) is not None:
                order = depth_write(order, slots[0, i], slots[1, i], stream.layer_rows[layer], kind)
        out, order = depth_attention(q, k, v, order, stream.layer_rows[2], q_depth=q_depth, mask=mask)
        inputs = (q, k, v, *slots)
        wide = [x.double() for x in inputs]
        truth = naive_attention(*wide, q_depth=q_depth.double(), slots=case.reads[2])[0]
        low = naive_attention(*inputs, q_depth=q_depth, slots=case.reads[2])[0]
        assert compare("out", out, low, truth).passed, str(compare("out", out, low, truth))
        truth, low = naive_attention(*wide[:3])[0], naive_attention(*inputs[:3])[0]
        assert compare("out", first, low, truth).passed, str(compare("out", first, low, truth))


def test_a_mask_is_for_inference() -> None:
    stream = DepthStream(layout(2), "reference")
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask is for inference"):
        depth_attention(q, q, q, stream.start(), stream.layer_rows[0], mask=mask)
    with torch.no_grad(), pytest.raises(ValueError, match="mask is for inference"):
        cu = torch.tensor([0, 3], dtype=torch.int32)
        depth_attention(q, q, q, stream.start(), stream.layer_rows[0], mask=mask, cu_seqlens=cu)
    for wrong in (mask.float(), mask[:, :2], mask[0]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"mask must be bool of shape \[1, 3, 3\] on cpu, got"):
            depth_attention(q, q, q, stream.start(), stream.layer_rows[0], mask=wrong)
