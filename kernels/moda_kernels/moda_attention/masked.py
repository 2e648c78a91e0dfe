"""Plain attention under any mask, with its LSE: for scoring many continuations of one text in one row, not for training."""

from __future__ import annotations

import torch

__all__ = ["masked_attention", "merge"]


#: At most so many logits at once in the computation that keeps them (512 MiB in fp32).
MAX_LOGITS = 1 << 27


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q k^T, where mask) v`` in fp32 or above inside. Memory grows with T squared.

    :param q: ``[B, T, Hq, D]``. :param k, v: ``[B, T, Hk, D]``.
    :param mask: bool ``[B, T, T]``: query i sees key j. Every query must see a key.

    :returns: output ``[B, T, Hq, D]`` in q's dtype and natural-log LSE ``[B, Hq, T]``, fp32 or above.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    q = q.transpose(1, 2)
    T = q.shape[2]
    # PyTorch's kernel wants rows of its bias on 16-byte boundaries, and pads its LSE.
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and T % 8 == 0:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias[:, None].expand(-1, q.shape[1], -1, -1), True, 0.0, False, scale=scale
        )
        return out.transpose(1, 2), lse[..., :T]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    rows = max(1, MAX_LOGITS // (q.shape[1] * T * T))
    for q_, k_, v_, mask_ in zip(*(x.split(rows) for x in (q, k, v, mask))):
        logits = (q_.to(wide) @ k_.to(wide).mT * scale).masked_fill_(~mask_[:, None], float("-inf"))
        lses.append(logits.logsumexp(-1))
        outs.append((logits.sub_(lses[-1][..., None]).exp_() @ v_.to(wide)).to(q.dtype))
    return torch.cat(outs).transpose(1, 2), torch.cat(lses)


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """The output of one softmax over the keys of both: ``[B, T, Hq, D]`` from two outputs and two LSEs ``[B, Hq, T]``."""
    weight = torch.sigmoid(other_lse - lse).mT[..., None]
    return (out + weight * (other - out)).to(out.dtype)
