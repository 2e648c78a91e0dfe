"""Doubly stochastic matrices: the kernel and its gradient against PyTorch's autograd, and what they are."""

from __future__ import annotations

import pytest
import torch

from moda_kernels.sinkhorn import naive_sinkhorn, sinkhorn
from moda_kernels.yardstick import report, verdicts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n, iterations", [(4, 3), (4, 20), (3, 5), (1, 2), (2, 1), (128, 1)])
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_is_the_plain_computation(n: int, iterations: int) -> None:
    """More matrices than a program has, from near the identity to far from any."""
    from moda_kernels.sinkhorn import kernel

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(150, n, n, generator=generator)
    logits[:50] -= 8 * (1 - torch.eye(n))
    logits, grad = logits.to(DEVICE), torch.randn(150, n, n, generator=generator).to(DEVICE)
    seen = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        out = naive_sinkhorn(x, iterations)
        seen.append({"out": out, "logits": torch.autograd.grad(out, x, grad.to(dtype))[0]})
    result = {
        "out": kernel.sinkhorn_forward(logits, iterations),
        "logits": kernel.sinkhorn_backward(logits, grad, iterations),
    }
    judged = verdicts(result, *seen)
    assert all(v.passed for v in judged), report(judged)


def test_rows_and_columns_sum_to_one() -> None:
    logits = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = sinkhorn(logits, 40)
    for dim in (-1, -2):
        torch.testing.assert_close(out.sum(dim), torch.ones(2, 5, 4, dtype=torch.float64))


@pytest.mark.gpu
def test_the_op_differentiates_and_compiles() -> None:
    logits = torch.randn(2, 5, 4, 4, device=DEVICE, requires_grad=True)
    grad = torch.randn(2, 5, 4, 4, device=DEVICE)
    (exact,) = torch.autograd.grad(naive_sinkhorn(logits, 20), logits, grad)
    for f in (sinkhorn, torch.compile(sinkhorn, fullgraph=True)):
        torch.testing.assert_close(torch.autograd.grad(f(logits, 20), logits, grad)[0], exact)
