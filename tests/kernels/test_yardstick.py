"""The tolerance itself: what passes, what does not, and the corners."""

from __future__ import annotations

import pytest
import torch

from moda_kernels.yardstick import FACTOR, compare, relative_error, report, verdicts


def test_bound_is_twice_the_plain_error() -> None:
    truth = torch.randn(64, 64, dtype=torch.float64)
    plain = (truth * (1 + 1e-2)).to(torch.bfloat16)
    error = relative_error(plain, truth)
    for factor, passes in ((1.9, True), (2.1, False)):
        result = (truth * (1 + factor * error)).float()
        verdict = compare("x", result, plain, truth)
        assert verdict.passed is passes and verdict.bound == pytest.approx(FACTOR * error)


def test_exact_zero_truth_is_judged_by_absolute_norm() -> None:
    truth = torch.zeros(8, dtype=torch.float64)
    plain = torch.zeros(8, dtype=torch.bfloat16)
    assert compare("x", plain, plain, truth).passed
    assert not compare("x", torch.full((8,), 0.1, dtype=torch.bfloat16), plain, truth).passed


def test_nan_never_passes() -> None:
    truth = torch.randn(8, dtype=torch.float64)
    bad = truth.float()
    bad[3] = float("nan")
    assert not compare("x", bad, truth.to(torch.bfloat16), truth).passed
    assert not compare("x", truth.float(), bad, truth).passed, "a plain result that is not finite gives no bound"


def test_an_exact_plain_result_leaves_one_rounding() -> None:
    truth = torch.full((8,), 1.0, dtype=torch.float64)
    assert compare("x", torch.full((8,), 1.0, dtype=torch.bfloat16), truth.to(torch.bfloat16), truth).passed


def test_missing_results_fail_and_shapes_must_agree() -> None:
    truth = {"a": torch.ones(2, dtype=torch.float64), "b": None}
    judged = verdicts({}, {"a": torch.ones(2)}, truth)
    assert [v.passed for v in judged] == [False] and "a" in report(judged)
    with pytest.raises(ValueError, match="x must have one shape"):
        compare("x", torch.ones(3), torch.ones(2), torch.ones(2).double())
