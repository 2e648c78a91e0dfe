"""Attention under any mask, alone and with the depth stream: scores many continuations of one text in a row; no training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..moda_attention.backend import get_backend
from ..moda_attention.tensors import Result
from .stream import stream_of

#: At most so many logits at once in the computation that keeps them (512 MiB in fp32).
MAX_LOGITS = 1 << 27


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
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


def masked_read(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, q_depth: Tensor | None, cu_seqlens: Tensor | None, scale: float | None,
    mask: Tensor, depth_top: int | None, depth_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """:func:`.ops.depth_attention` under ``mask``: sequence and depth apart, then merged by log-sum-exp."""
    if cu_seqlens is not None or torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("depth_attention: mask is for inference without packed documents, got cu_seqlens or gradients")
    expected = (q.shape[0], q.shape[1], q.shape[1])
    if mask.dtype != torch.bool or mask.shape != expected or mask.device != q.device:
        got = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
        raise ValueError(f"depth_attention: mask must be bool of shape {list(expected)} on {q.device}, got {got}")
    sequence = Result(*masked_attention(q, k, v, mask, scale))
    stream, layer = stream_of(row)
    x, slots = stream.inputs(layer, q, None, None, q_depth, depth_bias)
    if x.depth_k is None:
        return sequence.out
    p = stream.problem(x, slots, scale=scale, depth_top=depth_top)
    return get_backend(stream.backend, p.kind).add_depth(p, x, sequence)
