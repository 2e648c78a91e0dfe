"""Floors: no implementation on this GPU runs faster than the larger of two times.

    operations / matrix rate:   forward 4 N Hq D, backward 2.5 times that; N is the number of (query, key) pairs of one head:
                                sequence T^2 / 2 (causal; T^2 otherwise; the sum over documents where packed) plus depth
                                T S (C + 1) / 2
    bytes / memory bandwidth:   every tensor once. Forward reads q, k, v, depth K and V and writes out and the LSE; backward
                                reads those, out, its gradient and the LSE, and writes the gradient of every input.
                                ``add`` reads the depth gradients too (read-modify-write). Slots in fp8
                                have a byte per number and 4 per scale, their gradients are bf16.

Both rates are measured in the same run: a large device-to-device copy (bytes read plus written) and an 8192^3 bf16 product.
"""

import functools
from dataclasses import dataclass

import torch

from .cases import Case
from .timing import median_ms


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes and floating-point operations per second."""

    bandwidth: float
    matrix_rate: float


def measure_ceilings() -> Ceilings:
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(functools.partial(target.copy_, source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b)
    return Ceilings(2 * (1 << 32) / (copy * 1e-3), 2 * 8192**3 / (product * 1e-3))


def pairs(case: Case) -> float:
    """(query, key) pairs of one head of one batch row."""
    n = 0.0
    if case.sequence:
        n += case.docs * (case.T / case.docs) ** 2 * (0.5 if case.causal else 1.0)
    return n + case.T * case.S * (case.depth_chunk + 1) / 2


def floor_ms(case: Case, what: str, ceilings: Ceilings) -> float:
    """Milliseconds below which ``forward``, ``backward``, ``both`` or ``backward-add`` cannot go."""
    if what == "both":
        return floor_ms(case, "forward", ceilings) + floor_ms(case, "backward", ceilings)
    element = 2
    rows = case.B * case.T
    query = rows * case.G * case.Hk * case.D * element
    sequence = 2 * rows * case.Hk * case.D * element if case.sequence else 0
    gradients = 2 * case.S * rows * case.Hk * case.D * element
    depth = 2 * case.S * rows * case.Hk * (case.D + 4) if case.fp8 else gradients
    lse = rows * case.G * case.Hk * 4
    operations = 4 * pairs(case) * case.B * case.G * case.Hk * case.D
    moved = 2 * query + sequence + depth + lse
    if what != "forward":
        operations *= 2.5
        # read q, out, grad_out; k, v; depth; lse. Written: dq; dk, dv; depth gradients (read first where added to).
        moved = 4 * query + 2 * sequence + depth + (2 if what == "backward-add" else 1) * gradients + lse
    return 1e3 * max(operations / ceilings.matrix_rate, moved / ceilings.bandwidth)
