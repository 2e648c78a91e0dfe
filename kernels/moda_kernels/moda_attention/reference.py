"""The reference backend: the equation of MoDA (:mod:`.naive`) in bounded memory, forward and backward, on any device.

Arithmetic is fp32 for half-precision inputs and fp64 for fp64 ones. Queries are taken in blocks of rows, so that memory
is bounded by ``MAX_LOGITS`` logits whatever T is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import Backend
from .problem import Kind, Problem, row_bounds
from .quantised import dequantised
from .tensors import DepthGradients, DepthTarget, Gradients, Inputs, Result

MAX_LOGITS = 1 << 28  # 1 GiB of fp32 logits in one block of query rows


def _row_blocks(p: Problem) -> Iterator[tuple[int, int, int]]:
    """First and past-the-last row of each block, and how many sequence keys its rows can see."""
    width = (p.length if p.has_sequence else 0) + p.n_slots * p.depth_chunk
    step = max(1, min(p.length, MAX_LOGITS // max(1, p.batch * p.n_heads * width)))
    for lo in range(0, p.length, step):
        hi = min(p.length, lo + step)
        yield lo, hi, (hi if p.causal else p.length) if p.has_sequence else 0


def _hidden_sequence(p: Problem, lo: int, hi: int, end: int) -> Tensor | None:
    """``[hi - lo, end]`` mask of the sequence keys that rows lo..hi must not see, or None if they see all."""
    start, _ = row_bounds(p, depth=False)
    if not p.causal and start is None:
        return None
    rows = torch.arange(lo, hi, device=p.device)[:, None]
    cols = torch.arange(end, device=p.device)[None, :]
    hidden = torch.zeros(hi - lo, end, dtype=torch.bool, device=p.device)
    if p.causal:
        hidden |= cols > rows
    if start is not None:
        hidden |= start[cols] != start[rows]
    return hidden


def _depth_tokens(p: Problem, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """The tokens whose slots rows lo..hi see: ``[R, C]`` indices and the ``[R, C]`` mask of those not seen."""
    rows = torch.arange(lo, hi, device=p.device)
    chunk_start, _ = row_bounds(p, depth=True)
    first = rows if chunk_start is None else chunk_start[lo:hi]
    tokens = first[:, None] + torch.arange(p.depth_chunk, device=p.device)
    return tokens.clamp(max=p.length - 1), tokens > rows[:, None]


def _grouped(x: Tensor, p: Problem, lo: int, hi: int) -> Tensor:
    """Rows lo..hi of ``[B, T, Hq, D]`` as ``[B, R, Hk, G, D]`` in the compute dtype."""
    return (
        x[:, lo:hi]
        .to(torch.promote_types(p.dtype, torch.float32))
        .reshape(p.batch, hi - lo, p.n_kv_heads, p.group, p.head_dim)
    )


def _logits(p: Problem, lo: int, hi: int, end: int, x: Inputs) -> Tensor:
    """``[B, Hk, G, R, end + C * S]`` scaled and masked logits of rows lo..hi, sequence keys first."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    parts: list[Tensor] = []
    if x.k is not None:
        s = torch.einsum("brhgd,bnhd->bhgrn", _grouped(x.q, p, lo, hi) * p.scale, x.k[:, :end].to(dtype))
        hidden = _hidden_sequence(p, lo, hi, end)
        parts.append(s if hidden is None else s.masked_fill_(hidden, float("-inf")))
    if x.depth_k is not None:
        tokens, hidden = _depth_tokens(p, lo, hi)
        qd = _grouped(x.depth_query, p, lo, hi) * p.scale
        s = torch.einsum("brhgd,sbrchd->bhgrcs", qd, x.depth_k[:, :, tokens].to(dtype))
        if x.depth_bias is not None:
            s += x.depth_bias
        s = s.masked_fill_(hidden[:, :, None], float("-inf")).flatten(-2)
        if p.depth_top is not None and p.depth_top < s.shape[-1]:
            s.masked_fill_(s < s.topk(p.depth_top).values[..., -1:], float("-inf"))
        parts.append(s)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _selected(p: Problem, x: Inputs) -> Inputs:
    """The inputs with only those depth slots that are read, as numbers."""
    x = x if p.table is None else x.with_slots(p.table)
    return dequantised(x, torch.promote_types(p.dtype, torch.float32))


class Reference(Backend):
    name = "reference"

    def unsupported(self, kind: Kind) -> str | None:
        return None  # everything that a Problem can describe

    def forward(self, p: Problem, x: Inputs) -> Result:
        """Output in q's dtype, LSE in the compute dtype."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        x = _selected(p, x)
        out = torch.empty(x.q.shape, dtype=p.dtype, device=p.device)
        lse = torch.empty(p.batch, p.n_heads, p.length, dtype=dtype, device=p.device)
        for lo, hi, end in _row_blocks(p):
            logits = _logits(p, lo, hi, end, x)
            row_lse = logits.logsumexp(dim=-1, keepdim=True)
            probs = logits.sub_(row_lse).exp_()
            o = torch.zeros(p.batch, hi - lo, p.n_kv_heads, p.group, p.head_dim, dtype=dtype, device=p.device)
            if x.v is not None:
                o += torch.einsum("bhgrn,bnhd->brhgd", probs[..., :end], x.v[:, :end].to(dtype))
            if x.depth_v is not None:
                tokens, _ = _depth_tokens(p, lo, hi)
                pd = probs[..., end:].unflatten(-1, (p.depth_chunk, p.n_slots))
                o += torch.einsum("bhgrcs,sbrchd->brhgd", pd, x.depth_v[:, :, tokens].to(dtype))
            out[:, lo:hi] = o.reshape(p.batch, hi - lo, p.n_heads, p.head_dim).to(p.dtype)
            lse[:, :, lo:hi] = row_lse.squeeze(-1).flatten(1, 2)
        return Result(out, lse)

    def backward(
        self, p: Problem, grad_out: Tensor, grad_lse: Tensor | None, x: Inputs, saved: Result, depth: DepthTarget
    ) -> Gradients:
        dtype = torch.promote_types(p.dtype, torch.float32)
        x = _selected(p, x)
        like = [() if tensor is None else tensor.shape for tensor in (x.k, x.v, x.depth_k, x.depth_v)]
        dk, dv, dkd, dvd = (torch.zeros(shape, dtype=dtype, device=p.device) for shape in like)
        dq = torch.zeros(p.batch, p.length, p.n_kv_heads, p.group, p.head_dim, dtype=dtype, device=p.device)
        dqd = dq if x.q_depth is None else torch.zeros_like(dq)
        dbias = None if x.depth_bias is None else torch.zeros_like(x.depth_bias)
        for lo, hi, end in _row_blocks(p):
            logits = _logits(p, lo, hi, end, x)
            probs = torch.softmax(logits, dim=-1)  # exactly normalised: exp(logits - lse) has the rounding of lse in it
            if p.partial:
                probs = (logits - saved.lse[:, :, lo:hi].unflatten(1, (p.n_kv_heads, p.group)).unsqueeze(-1)).exp()
            do = _grouped(grad_out, p, lo, hi)
            delta = (do * _grouped(saved.out, p, lo, hi)).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
            if grad_lse is not None:
                delta = delta - grad_lse[:, :, lo:hi].to(dtype).unflatten(1, (p.n_kv_heads, p.group)).unsqueeze(-1)
            if x.k is not None and x.v is not None:
                pr = probs[..., :end]
                dv[:, :end] += torch.einsum("bhgrn,brhgd->bnhd", pr, do)
                ds = pr * (torch.einsum("brhgd,bnhd->bhgrn", do, x.v[:, :end].to(dtype)) - delta) * p.scale
                dk[:, :end] += torch.einsum("bhgrn,brhgd->bnhd", ds, _grouped(x.q, p, lo, hi))
                dq[:, lo:hi] += torch.einsum("bhgrn,bnhd->brhgd", ds, x.k[:, :end].to(dtype))
            if x.depth_k is not None and x.depth_v is not None:
                tokens, _ = _depth_tokens(p, lo, hi)
                pr = probs[..., end:].unflatten(-1, (p.depth_chunk, p.n_slots))
                dp = torch.einsum("brhgd,sbrchd->bhgrcs", do, x.depth_v[:, :, tokens].to(dtype))
                ds = pr * (dp - delta.unsqueeze(-1))
                if dbias is not None:
                    dbias += ds.sum((0, 1, 2, 3, 4))
                ds *= p.scale
                qd = _grouped(x.depth_query, p, lo, hi)
                dqd[:, lo:hi] += torch.einsum("bhgrcs,sbrchd->brhgd", ds, x.depth_k[:, :, tokens].to(dtype))
                dkd.index_add_(2, tokens.flatten(), torch.einsum("bhgrcs,brhgd->sbrchd", ds, qd).flatten(2, 3))
                dvd.index_add_(2, tokens.flatten(), torch.einsum("bhgrcs,brhgd->sbrchd", pr, do).flatten(2, 3))
        if x.depth_k is not None:
            assert isinstance(depth, DepthGradients)
            store_or_add(depth.k, dkd, depth.fresh, p.table)
            store_or_add(depth.v, dvd, depth.fresh, p.table)

        def final(grad: Tensor, like: Tensor | None) -> Tensor | None:
            return None if like is None else grad.reshape(like.shape).to(p.dtype)

        of_depth = final(dqd, x.q_depth), dbias
        return Gradients(dq.reshape(x.q.shape).to(p.dtype), final(dk, x.k), final(dv, x.v), *of_depth)


def store_or_add(buffer: Tensor, grad: Tensor, fresh: tuple[int, int], table: Tensor | None) -> None:
    """Store ``grad[i]`` into ``buffer[table[i]]`` where ``fresh[0] <= i < fresh[1]``, add it elsewhere, in place."""
    lo, hi = fresh
    for part, adds in ((slice(0, lo), True), (slice(lo, hi), False), (slice(hi, None), True)):
        at = part if table is None else table[part]
        buffer[at] = (buffer[at].to(grad.dtype) + grad[part] if adds else grad[part]).to(buffer.dtype)


backend = Reference()
