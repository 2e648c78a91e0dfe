"""The reference backend: the equation of MoDA in vectorised PyTorch, forward and backward, on any device.

For query head h of token t, with key/value head k = h // G (MoDA paper, section 3, eq. for the joint softmax):

    logits = [ q . K_seq[0..t] , q_depth . K_depth[t, 0..S-1] ] * scale
    out    = softmax(logits) . [ V_seq[0..t] ; V_depth[t, 0..S-1] ]

Arithmetic is fp32 for half-precision inputs and fp64 for fp64 ones. Queries are taken in blocks of rows, so that memory
is bounded by ``MAX_LOGITS`` logits whatever T is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .problem import Problem

__all__ = ["backward", "forward", "store_or_add", "unsupported"]

name = "reference"

MAX_LOGITS = 1 << 28  # 1 GiB of fp32 logits in one block of query rows


def unsupported(p: Problem) -> str | None:
    """The reference does everything that :class:`Problem` can describe."""
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_blocks(p: Problem) -> Iterator[tuple[int, int]]:
    width = (p.length if p.has_sequence else 0) + p.n_slots * p.depth_chunk
    step = max(1, min(p.length, MAX_LOGITS // max(1, p.batch * p.n_heads * width)))
    for lo in range(0, p.length, step):
        yield lo, min(p.length, lo + step)


def _document_start(p: Problem) -> torch.Tensor:
    """``[T]`` index of the first token of every token's document."""
    if p.cu_seqlens is None:
        return torch.zeros(p.length, dtype=torch.long, device=p.device)
    cu = p.cu_seqlens.long()
    tokens = torch.arange(p.length, device=p.device)
    return cu[torch.searchsorted(cu, tokens, right=True) - 1]


def _hidden_sequence(p: Problem, lo: int, hi: int, end: int) -> torch.Tensor | None:
    """``[hi - lo, end]`` mask of the sequence keys that rows lo..hi must not see, or None if they see all."""
    if not p.causal and p.cu_seqlens is None:
        return None
    rows = torch.arange(lo, hi, device=p.device)[:, None]
    cols = torch.arange(end, device=p.device)[None, :]
    hidden = torch.zeros(hi - lo, end, dtype=torch.bool, device=p.device)
    if p.causal:
        hidden |= cols > rows
    if p.cu_seqlens is not None:
        start = _document_start(p)
        hidden |= start[cols] != start[rows]
    return hidden


def _depth_tokens(p: Problem, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose slots rows lo..hi see: ``[R, C]`` indices and the ``[R, C]`` mask of those not seen."""
    rows = torch.arange(lo, hi, device=p.device)
    start = _document_start(p)[lo:hi]
    first = start + (rows - start) // p.depth_chunk * p.depth_chunk
    tokens = first[:, None] + torch.arange(p.depth_chunk, device=p.device)
    hidden = tokens > rows[:, None]
    return tokens.clamp(max=p.length - 1), hidden


def _grouped(x: torch.Tensor, p: Problem, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows lo..hi of ``[B, T, Hq, D]`` as ``[B, R, Hk, G, D]`` in the compute dtype."""
    return x[:, lo:hi].to(dtype).reshape(p.batch, hi - lo, p.n_kv_heads, p.group, p.head_dim)


def _logits(
    p: Problem,
    lo: int,
    hi: int,
    end: int,
    q: torch.Tensor,
    k: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    q_depth: torch.Tensor | None,
) -> torch.Tensor:
    """``[B, Hk, G, R, end + C * S]`` scaled and masked logits of rows lo..hi, sequence keys first."""
    dtype = compute_dtype(p.dtype)
    parts: list[torch.Tensor] = []
    if k is not None:
        s = torch.einsum("brhgd,bnhd->bhgrn", _grouped(q, p, lo, hi, dtype) * p.scale, k[:, :end].to(dtype))
        hidden = _hidden_sequence(p, lo, hi, end)
        parts.append(s if hidden is None else s.masked_fill_(hidden, float("-inf")))
    if depth_k is not None:
        qd = _grouped(q if q_depth is None else q_depth, p, lo, hi, dtype) * p.scale
        tokens, hidden = _depth_tokens(p, lo, hi)
        s = torch.einsum("brhgd,sbrchd->bhgrcs", qd, depth_k[:, :, tokens].to(dtype))
        s = s.masked_fill_(hidden[:, :, None], float("-inf"))
        parts.append(s.flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def forward(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, T, Hq, D]`` in q's dtype and natural-log LSE ``[B, Hq, T]`` in the compute dtype."""
    dtype = compute_dtype(p.dtype)
    if p.n_slots == 0:
        depth_k = depth_v = q_depth = None
    out = torch.empty(p.batch, p.length, p.n_heads, p.head_dim, dtype=p.dtype, device=p.device)
    lse = torch.empty(p.batch, p.n_heads, p.length, dtype=dtype, device=p.device)
    for lo, hi in _row_blocks(p):
        end = 0 if k is None else (hi if p.causal else p.length)
        logits = _logits(p, lo, hi, end, q, k, depth_k, q_depth)
        row_lse = logits.logsumexp(dim=-1, keepdim=True)
        probs = logits.sub_(row_lse).exp_()
        o = torch.zeros(p.batch, hi - lo, p.n_kv_heads, p.group, p.head_dim, dtype=dtype, device=p.device)
        if v is not None:
            o += torch.einsum("bhgrn,bnhd->brhgd", probs[..., :end], v[:, :end].to(dtype))
        if depth_v is not None:
            tokens, _ = _depth_tokens(p, lo, hi)
            pd = probs[..., end:].unflatten(-1, (p.depth_chunk, p.n_slots))
            o += torch.einsum("bhgrcs,sbrchd->brhgd", pd, depth_v[:, :, tokens].to(dtype))
        out[:, lo:hi] = o.reshape(p.batch, hi - lo, p.n_heads, p.head_dim).to(p.dtype)
        lse[:, :, lo:hi] = row_lse.squeeze(-1).flatten(1, 2)
    return out, lse


def backward(
    p: Problem,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None,
    depth_v: torch.Tensor | None,
    q_depth: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_depth_k: torch.Tensor | None,
    grad_depth_v: torch.Tensor | None,
    fresh: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v and q_depth; the depth gradients go into the given buffers.

    :param fresh: slots ``lo <= s < hi`` of the buffers are stored, the others are added to.
    """
    dtype = compute_dtype(p.dtype)
    if p.n_slots == 0:
        depth_k = depth_v = q_depth = None
    dq = torch.zeros(p.batch, p.length, p.n_kv_heads, p.group, p.head_dim, dtype=dtype, device=p.device)
    dqd = torch.zeros_like(dq) if q_depth is not None else dq
    dk = (
        torch.zeros(p.batch, p.length, p.n_kv_heads, p.head_dim, dtype=dtype, device=p.device)
        if k is not None
        else None
    )
    dv = torch.zeros_like(dk) if dk is not None else None
    dkd = torch.zeros(depth_k.shape, dtype=dtype, device=p.device) if depth_k is not None else None
    dvd = torch.zeros(depth_k.shape, dtype=dtype, device=p.device) if depth_k is not None else None
    for lo, hi in _row_blocks(p):
        end = 0 if k is None else (hi if p.causal else p.length)
        logits = _logits(p, lo, hi, end, q, k, depth_k, q_depth)
        probs = torch.softmax(logits, dim=-1)  # exactly normalised: exp(logits - lse) has the rounding of lse in it
        do = _grouped(grad_out, p, lo, hi, dtype)
        delta = (do * _grouped(out, p, lo, hi, dtype)).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, lo:hi].to(dtype).unflatten(1, (p.n_kv_heads, p.group)).unsqueeze(-1)
        if k is not None and v is not None and dk is not None and dv is not None:
            pr = probs[..., :end]
            dv[:, :end] += torch.einsum("bhgrn,brhgd->bnhd", pr, do)
            ds = pr * (torch.einsum("brhgd,bnhd->bhgrn", do, v[:, :end].to(dtype)) - delta) * p.scale
            dk[:, :end] += torch.einsum("bhgrn,brhgd->bnhd", ds, _grouped(q, p, lo, hi, dtype))
            dq[:, lo:hi] += torch.einsum("bhgrn,bnhd->brhgd", ds, k[:, :end].to(dtype))
        if depth_k is not None and depth_v is not None and dkd is not None and dvd is not None:
            tokens, _ = _depth_tokens(p, lo, hi)
            flat = tokens.flatten()
            pr = probs[..., end:].unflatten(-1, (p.depth_chunk, p.n_slots))
            dp = torch.einsum("brhgd,sbrchd->bhgrcs", do, depth_v[:, :, tokens].to(dtype))
            ds = pr * (dp - delta.unsqueeze(-1)) * p.scale
            qd = _grouped(q if q_depth is None else q_depth, p, lo, hi, dtype)
            dqd[:, lo:hi] += torch.einsum("bhgrcs,sbrchd->brhgd", ds, depth_k[:, :, tokens].to(dtype))
            dkd.index_add_(2, flat, torch.einsum("bhgrcs,brhgd->sbrchd", ds, qd).flatten(2, 3))
            dvd.index_add_(2, flat, torch.einsum("bhgrcs,brhgd->sbrchd", pr, do).flatten(2, 3))
    if dkd is not None and dvd is not None:
        assert grad_depth_k is not None and grad_depth_v is not None
        store_or_add(grad_depth_k, dkd, fresh)
        store_or_add(grad_depth_v, dvd, fresh)

    def final(x: torch.Tensor | None, heads: int) -> torch.Tensor | None:
        return None if x is None else x.reshape(p.batch, p.length, heads, p.head_dim).to(p.dtype)

    grad_q = final(dq, p.n_heads)
    assert grad_q is not None
    return (
        grad_q,
        final(dk, p.n_kv_heads),
        final(dv, p.n_kv_heads),
        final(dqd if q_depth is not None else None, p.n_heads),
    )


def store_or_add(buffer: torch.Tensor, grad: torch.Tensor, fresh: tuple[int, int]) -> None:
    """Store slots ``fresh[0] <= s < fresh[1]`` of ``grad`` into ``buffer`` and add the others, in place, rounding once."""
    lo, hi = fresh
    buffer[lo:hi] = grad[lo:hi].to(buffer.dtype)
    for part in (slice(0, lo), slice(hi, None)):
        buffer[part] = (buffer[part].to(grad.dtype) + grad[part]).to(buffer.dtype)
