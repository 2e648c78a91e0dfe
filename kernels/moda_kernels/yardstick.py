"""The one tolerance of the project: an error is judged against the error of the plain computation in the same dtype.

Inputs are drawn in the dtype under test. The very same values, upcast to fp64, give the truth. With the relative error

    err(x) = ||x - truth||_F / ||truth||_F                                (Frobenius norms over the whole tensor, in fp64)

a result passes when ``err(result) <= 2 * err(plain)``, where ``plain`` is what unfused PyTorch computes in that dtype (matrix
products, softmax and autograd on low-precision tensors: :func:`plain_attention`). The factor is :data:`FACTOR` everywhere;
there are no per-test tolerances.

Three corners. A result that is not finite where the truth is finite never passes. Where the truth is exactly zero the
relative error has no meaning: the absolute norms are compared instead. And the bound never falls below one rounding of the
truth to the result's dtype (:data:`FLOOR`): a plain computation that happens to be exact would otherwise ask for what no dtype
can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["FACTOR", "FLOOR", "Verdict", "compare", "plain_attention", "relative_error", "report", "verdicts"]

FACTOR = 2.0

#: The unit roundoff of a result's dtype: half the distance between neighbouring numbers, relative.
FLOOR: dict[torch.dtype, float] = {
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
    torch.float32: 2.0**-25,
    torch.float64: 2.0**-54,
}


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


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """``||result - truth||_F / ||truth||_F`` in fp64; the absolute norm where the truth is exactly zero; inf if not finite."""
    truth = truth.detach().double()
    difference = result.detach().double() - truth
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    norm = float(truth.norm())
    return float(difference.norm()) / norm if norm > 0 else float(difference.norm())


def compare(name: str, result: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> Verdict:
    """Judge one tensor. All three have one shape; ``plain`` is the low-precision computation, ``truth`` is fp64."""
    if result.shape != truth.shape or plain.shape != truth.shape:
        raise ValueError(
            f"yardstick: {name} must have one shape, got result {list(result.shape)}, plain {list(plain.shape)}, "
            f"truth {list(truth.shape)}"
        )
    error, plain_error = relative_error(result, truth), relative_error(plain, truth)
    bound = FACTOR * max(plain_error, FLOOR[result.dtype]) if plain_error != float("inf") else float("nan")
    return Verdict(name, error, plain_error, bound, error <= bound)


def verdicts(
    results: Mapping[str, torch.Tensor | None],
    plain: Mapping[str, torch.Tensor | None],
    truth: Mapping[str, torch.Tensor | None],
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
    """One line a tensor, failures first."""
    return "\n".join(str(v) for v in sorted(judged, key=lambda v: v.passed))


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None = None,
    depth_v: torch.Tensor | None = None,
    *,
    q_depth: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    depth_chunk: int = 1,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MoDA as anyone would write it: dense logits, one softmax, in the dtype of its inputs, differentiable by autograd.

    In a low-precision dtype this is the yardstick's ``plain``; in fp64 it is a second, independent truth. Shapes as in
    :func:`moda_kernels.moda_attention.moda_attention`; returns ``[B, T, Hq, D]`` and the LSE ``[B, Hq, T]``. Memory grows as
    T * (T + S * T) where ``depth_chunk > 1`` or documents are packed, so it is for small shapes.
    """
    B, T, Hq, D = q.shape
    heads = (k if k is not None else depth_k).shape[-2]  # type: ignore[union-attr]
    scale = D**-0.5 if scale is None else scale
    token = torch.arange(T, device=q.device)
    start = torch.zeros_like(token)
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        start = cu[torch.searchsorted(cu, token, right=True) - 1]

    def expand(x: torch.Tensor) -> torch.Tensor:  # [..., Hk, D] -> [..., Hq, D]
        return x.repeat_interleave(Hq // heads, dim=-2)

    logits, values = [], []
    if k is not None and v is not None:
        s = torch.einsum("bthd,bnhd->bhtn", q, expand(k)) * scale
        seen = start[:, None] == start[None, :]
        if causal:
            seen = seen & (token[:, None] >= token[None, :])
        logits.append(s.masked_fill(~seen, float("-inf")))
        values.append(expand(v).transpose(1, 2))  # [B, Hq, N, D], shared by all queries
    deep = depth_k is not None and depth_v is not None and depth_k.shape[0] > 0
    own = deep and depth_chunk == 1
    if deep:
        assert depth_k is not None and depth_v is not None
        qd = q if q_depth is None else q_depth
        if own:
            logits.append(torch.einsum("bthd,sbthd->bhts", qd, expand(depth_k)) * scale)
        else:
            s = torch.einsum("bthd,sbuhd->bhtus", qd, expand(depth_k)) * scale
            first = start + (token - start) // depth_chunk * depth_chunk
            seen = (token[None, :] <= token[:, None]) & (token[None, :] >= first[:, None])
            logits.append(s.masked_fill(~seen[:, :, None], float("-inf")).flatten(-2))
            values.append(expand(depth_v).permute(1, 3, 2, 0, 4).flatten(2, 3))
    joined = torch.cat(logits, dim=-1)
    lse = torch.logsumexp(joined.double() if joined.dtype == torch.float64 else joined.float(), dim=-1)
    probs = joined.softmax(dim=-1)
    out = torch.zeros(B, Hq, T, D, dtype=q.dtype, device=q.device)
    at = 0
    for value in values:
        n = value.shape[2]
        out = out + torch.einsum("bhtn,bhnd->bhtd", probs[..., at : at + n], value)
        at += n
    if own:
        assert depth_v is not None
        out = out + torch.einsum("bhts,sbthd->bhtd", probs[..., at:], expand(depth_v))
    return out.transpose(1, 2).contiguous(), lse
