"""The one tolerance of the project: an error is judged against the error of the plain computation in the same dtype.

Inputs are drawn in the dtype under test. The very same values, upcast to fp64, give the truth. With the relative error

    err(x) = ||x - truth||_F / ||truth||_F                                (Frobenius norms over the whole tensor, in fp64)

a result passes when ``err(result) <= 2 * err(plain)``, where ``plain`` is what unfused PyTorch computes in that dtype (matrix
products, softmax and autograd on low-precision tensors). Both truth and ``plain`` come from one function,
:func:`~moda_kernels.moda_attention.naive.naive_attention`. The factor is :data:`FACTOR` everywhere; there are no per-test
tolerances.

Three corners. A result that is not finite where the truth is finite never passes. Where the truth is exactly zero the
relative error has no meaning: the absolute norms are compared instead. And the bound never falls below one rounding of the
truth to the result's dtype (:data:`FLOOR`): a plain computation that happens to be exact would otherwise ask for what no dtype
can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FACTOR", "FLOOR", "Verdict", "compare", "relative_error", "report", "verdicts"]

FACTOR = 2.0

#: One rounding to a result's dtype, relative: half the distance between neighbouring numbers, where that is smallest.
FLOOR = {t: torch.finfo(t).eps / 4 for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Verdict:
    """One tensor's comparison."""

    name: str
    error: float
    plain_error: float
    bound: float
    passed: bool

    def __str__(self) -> str:
        sign = "<=" if self.passed else ">"
        return f"{self.name}: error {self.error:.2e} {sign} {self.bound:.2e} (plain {self.plain_error:.2e})"


def relative_error(result: Tensor, truth: Tensor) -> float:
    """``||result - truth||_F / ||truth||_F`` in fp64; the absolute norm where the truth is exactly zero; inf if not finite."""
    truth = truth.detach().double()
    difference = result.detach().double() - truth
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    norm = float(truth.norm())
    return float(difference.norm()) / norm if norm > 0 else float(difference.norm())


def compare(name: str, result: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Judge one tensor. All three have one shape; ``plain`` is the low-precision computation, ``truth`` is fp64."""
    if result.shape != truth.shape or plain.shape != truth.shape:
        got = f"result {list(result.shape)}, plain {list(plain.shape)}, truth {list(truth.shape)}"
        raise ValueError(f"yardstick: {name} must have one shape, got {got}")
    error, plain_error = relative_error(result, truth), relative_error(plain, truth)
    bound = FACTOR * max(plain_error, FLOOR[result.dtype]) if plain_error != float("inf") else float("nan")
    return Verdict(name, error, plain_error, bound, error <= bound)


def verdicts(
    results: Mapping[str, Tensor | None], plain: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None]
) -> list[Verdict]:
    """Judge every tensor that the truth has; a result that is missing fails."""
    out = []
    for name, exact in truth.items():
        if exact is None:
            continue
        result, low = results.get(name), plain.get(name)
        if result is None or low is None:
            out.append(Verdict(name, float("inf"), float("nan"), float("nan"), False))
        else:
            out.append(compare(name, result, low, exact))
    return out


def report(judged: Sequence[Verdict]) -> str:
    """One line per tensor, failures first."""
    return "\n".join(str(v) for v in sorted(judged, key=lambda v: v.passed))
