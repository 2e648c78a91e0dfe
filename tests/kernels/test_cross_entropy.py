"""Rows of logits become their gradient: the kernel against PyTorch, and labels that are none."""

from __future__ import annotations

import pytest
import torch

from moda_kernels.cross_entropy import cross_entropy_, naive_cross_entropy_
from moda_kernels.yardstick import report, verdicts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Z, ROWS = 1e-2, 32  # of few rows the largest errors say more about the numbers drawn than about the kernel


def judge(columns: int, vocab: int, dtype: torch.dtype, gradient: bool) -> None:
    from moda_kernels.cross_entropy import rows

    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, columns, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(0, vocab, (ROWS,), generator=generator).to(DEVICE)
    labels[:3] = torch.tensor([0, vocab - 1, -100])
    exact, plain = logits.double(), logits.clone()
    truth = naive_cross_entropy_(exact, labels, vocab, -100, Z, gradient)
    naive = naive_cross_entropy_(plain, labels, vocab, -100, Z, gradient)
    result = rows.cross_entropy_(logits, labels, vocab, -100, Z, gradient)
    names = ("ce", "z", "gradient")
    judged = verdicts(*(dict(zip(names, (*x, g))) for x, g in ((result, logits), (naive, plain), (truth, exact))))
    assert all(v.passed for v in judged), report(judged)
    if gradient:
        assert not logits[2].any() and not logits[:, vocab:].any()


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "losses"])
@pytest.mark.parametrize("columns, vocab", [(50, 50), (64, 50), (9000, 8200), (9000, 8192)])
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_is_the_plain_computation(columns: int, vocab: int, gradient: bool) -> None:
    """fp32 runs in Triton's interpreter; a row of more than one block, and a last block that is all padding."""
    judge(columns, vocab, torch.float32, gradient)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_the_kernel_in_bf16_at_its_own_vocabulary() -> None:
    judge(100_352, 100_278, torch.bfloat16, True)


def test_a_label_outside_the_vocabulary_is_no_loss() -> None:
    """On a GPU, which cannot raise: NaN."""
    from moda_kernels.cross_entropy import rows

    labels = torch.tensor([1, 50], device=DEVICE)
    ce, _ = rows.cross_entropy_(torch.zeros(2, 64, device=DEVICE), labels, 50, -100, 0.0, True)
    assert ce.isnan().tolist() == [False, True]
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy_(torch.zeros(2, 64), labels.cpu(), vocab=50, ignore_index=-100, z_loss=0.0, gradient=True)
