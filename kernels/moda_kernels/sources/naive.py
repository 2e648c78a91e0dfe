"""Sums over sources in PyTorch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .stream import Target


def _join(to: Target, grad: Tensor) -> None:
    first, end = to.new
    to.grad[:first] += grad[:first]
    to.grad[first:end] = grad[first:end]
    to.grad[end:] += grad[end:]


def _apart(sums: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in sums)


class NaiveSums:
    """See :class:`moda_kernels.sources.stream.Sums`."""

    def mix(self, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        token = "" if weights.ndim == 2 else "bt"
        return _apart(torch.einsum(f"{token}cn,nbtd->cbtd", weights.to(x.dtype), x))

    def mix_backward(self, x: Tensor, weights: Tensor, grads: Sequence[Tensor], to: Target) -> Tensor:
        token, grad = "" if weights.ndim == 2 else "bt", torch.stack(list(grads))
        _join(to, torch.einsum(f"{token}cn,cbtd->nbtd", weights.to(x.dtype), grad))
        return torch.einsum(f"cbtd,nbtd->{token}cn", grad, x).to(weights.dtype)

    def _logits(self, x: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Logits ``[n, B, T, c]`` and the norm's scales ``[n, B, T]``; one source at a time is copied in fp32 or above."""
        wide = queries.dtype
        dots = torch.stack([source.to(wide) @ queries.mT for source in x])
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, dtype=wide).square() / x.shape[-1] + eps)
        return dots * scale[..., None], scale

    def attend(self, x: Tensor, queries: Tensor, eps: float) -> tuple[tuple[Tensor, ...], Tensor]:
        logits, _ = self._logits(x, queries, eps)
        lse = logits.logsumexp(0)
        out = torch.einsum("nbtc,nbtd->cbtd", (logits - lse).exp().to(x.dtype), x)
        return _apart(out), lse.movedim(-1, 0)

    def attend_backward(
        self, x: Tensor, queries: Tensor, eps: float, out: Sequence[Tensor], lse: Tensor, grads: Sequence[Tensor],
        grad_lse: Tensor, to: Target,
    ) -> Tensor:  # fmt: skip
        grad, sums, wide = torch.stack(list(grads)), torch.stack(list(out)), queries.dtype
        logits, scale = self._logits(x, queries, eps)
        p = (logits - lse.movedim(0, -1)).exp()
        shift = (grad_lse - (grad.to(wide) * sums.to(wide)).sum(-1)).movedim(0, -1)
        d_logits = p * (torch.einsum("cbtd,nbtd->nbtc", grad, x).to(wide) + shift)
        d_dots = (d_logits * scale[..., None]).to(x.dtype)
        d_norm = (d_logits * logits).sum(-1) * scale.square() / x.shape[-1]
        joined = torch.einsum("nbtc,cbtd->nbtd", p.to(x.dtype), grad) + d_dots @ queries.to(x.dtype)
        _join(to, joined - d_norm[..., None].to(x.dtype) * x)
        return torch.einsum("nbtc,nbtd->cd", d_dots, x).to(wide)
