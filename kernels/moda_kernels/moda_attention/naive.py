"""The equation of MoDA as anyone would write it: dense logits, one softmax, gradients by autograd. Read this first.

For query head h of token t, with key/value head h // G (MoDA paper, arXiv 2603.15619, section 3):

    logits = [ q . K_seq[0..t] , q_depth . K_depth[t, 0..S-1] ] * scale
    out    = softmax(logits) . [ V_seq[0..t] ; V_depth[t, 0..S-1] ]

A bias of a slot, one number for all tokens and heads, is added to its logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def naive_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, depth_k: Tensor | None = None, depth_v: Tensor | None = None, *,
    q_depth: Tensor | None = None, causal: bool = True, scale: float | None = None, depth_chunk: int = 1,
    cu_seqlens: Tensor | None = None, slots: Tensor | Sequence[int] | None = None, depth_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``[B, T, Hq, D]`` and LSE ``[B, Hq, T]``; arguments as in :func:`moda_kernels.moda_attention`, and ``depth_bias``,
    ``[S]`` or a number for each of ``slots``.

    In fp64 this is the truth that every backend is judged against, in a low-precision dtype the yardstick's ``plain``. For
    small shapes: memory grows with T * (T + S), and with T * (T + S * T) where ``depth_chunk > 1``.
    """
    B, T, Hq, D = q.shape
    scale = D**-0.5 if scale is None else scale
    token = torch.arange(T, device=q.device)
    start = torch.zeros_like(token)  # the first token of each token's document
    if cu_seqlens is not None:
        start = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), token, right=True) - 1]

    def expand(x: Tensor) -> Tensor:  # [..., Hk, D] -> [..., Hq, D]
        return x.repeat_interleave(Hq // x.shape[-2], dim=-2)

    logits, products, values = [], [], []
    if k is not None and v is not None:
        seen = start[:, None] == start[None, :]
        if causal:
            seen = seen & (token[:, None] >= token[None, :])
        s = torch.einsum("bthd,bnhd->bhtn", q, expand(k)) * scale
        logits.append(s.masked_fill(~seen, float("-inf")))
        products.append("bhtn,bnhd->bthd")
        values.append(expand(v))
    if depth_k is not None and depth_v is not None:
        if slots is not None:
            index = torch.as_tensor(slots, dtype=torch.long, device=q.device)
            depth_k, depth_v = depth_k[index], depth_v[index]
        query = q if q_depth is None else q_depth
        if depth_chunk == 1:  # token t sees its own slots
            s = torch.einsum("bthd,sbthd->bhts", query, expand(depth_k)) * scale
            logits.append(s if depth_bias is None else s + depth_bias)
            products.append("bhts,sbthd->bthd")
            values.append(expand(depth_v))
        else:  # and those of the tokens u before it in its chunk
            chunk = start + (token - start) // depth_chunk * depth_chunk
            seen = (token[None, :] <= token[:, None]) & (token[None, :] >= chunk[:, None])
            s = torch.einsum("bthd,sbuhd->bhtus", query, expand(depth_k)) * scale
            s = s if depth_bias is None else s + depth_bias
            logits.append(s.masked_fill(~seen[:, :, None], float("-inf")).flatten(-2))
            products.append("bhtn,bnhd->bthd")
            values.append(expand(depth_v).permute(1, 2, 0, 3, 4).flatten(1, 2))
    joined = torch.cat(logits, dim=-1)
    lse = torch.logsumexp(joined if joined.dtype == torch.float64 else joined.float(), dim=-1)
    parts = joined.softmax(dim=-1).split([s.shape[-1] for s in logits], dim=-1)
    return sum(torch.einsum(e, p, x) for e, p, x in zip(products, parts, values)), lse  # type: ignore[return-value]
