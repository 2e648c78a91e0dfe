"""The parity gate: a variant that misses the yardstick in this run gets no time.

Two checks against :mod:`moda_kernels.yardstick`, same case, same inputs' distribution:

* a short copy of the case (:data:`GATE_LENGTH` tokens): output, LSE and every gradient against fp64;
* the case itself, at its full length, on :data:`SAMPLES` tokens spread over it: output, LSE, dq and, where a token's depth
  slots are its own, their gradients, against fp64 on those tokens; dk and dv of the sampled keys from all queries; and
  every element of every gradient finite. This is where a tile chosen for long rows or a 32-bit address would show.
"""

import dataclasses

import torch

from moda_kernels.moda_attention.naive import naive_attention
from moda_kernels.moda_attention.tensors import Result
from moda_kernels.yardstick import Verdict, relative_error, verdicts

from .cases import Case, draw, slots
from .variants import INPUTS, Tensors, Variant, bind

GATE_LENGTH = (
    528  # eight tiles of 64 and a rest, and divisible by 16 as the real lengths are: the kernels compiled are the same
)
SAMPLES = 12
Values = dict[str, torch.Tensor | None]


def _differentiate(case: Case, x: Tensors, depth: bool, dtype: torch.dtype) -> Values:
    """Output, LSE and gradients by autograd on the naive equation: the plain computation in bf16, the truth in fp64."""
    names = [n for n in INPUTS if x[n] is not None and (depth or not n.startswith("depth"))]
    leaves = {
        n: (slots(x, n, dtype) if n.startswith("depth") else x[n].detach().to(dtype)).requires_grad_()  # type: ignore[union-attr]
        for n in names
    }
    options = dict(causal=case.causal, depth_chunk=case.depth_chunk, cu_seqlens=x["cu_seqlens"])
    arguments = [leaves.get(n) for n in INPUTS]
    out, lse = naive_attention(*arguments, slots=case.slots if depth else None, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, list(leaves.values()), x["grad_out"].to(dtype))  # type: ignore[union-attr]
    by_name = {f"d{n}": g[:: case.every] if n.startswith("depth") else g for n, g in zip(names, grads)}
    return {"out": out.detach(), "lse": lse.detach(), **by_name}


def short_truth(case: Case, depth: bool) -> tuple[Tensors, Values, Values]:
    """Inputs of the short copy, the plain low-precision results and the fp64 truth."""
    short = dataclasses.replace(case, T=GATE_LENGTH, B=min(case.B, 2))
    if short.depth_chunk > 1:  # the plain computation holds T * T * S logits
        short = dataclasses.replace(short, S=min(short.S, 4))
    x = draw(short)
    return x, _differentiate(short, x, depth, torch.bfloat16), _differentiate(short, x, depth, torch.float64)


def rounding_errors(case: Case) -> str:
    """What rounding slots to fp8 does: relative errors of exact results (fp64) on the short copy, against unrounded slots."""
    _, _, rounded = short_truth(case, True)
    _, _, exact = short_truth(dataclasses.replace(case, fp8=False), True)
    pairs = ((n, rounded[n], t) for n, t in exact.items())
    return "; ".join(f"{n} {relative_error(a, b):.2e}" for n, a, b in pairs if a is not None and b is not None)


def check(variant: Variant, case: Case, x: Tensors, short: tuple[Tensors, Values, Values]) -> list[Verdict]:
    """All verdicts of a variant: the short copy's, then the full length's."""
    inputs, plain, truth = short
    copied = dataclasses.replace(case, T=GATE_LENGTH, B=min(case.B, 2))
    bound = bind(variant, copied, inputs)
    saved = bound.forward()
    results: Values = {"out": saved[0], "lse": saved[1], **bound.backward(saved)}
    judged = verdicts(results, plain, truth)
    del results, saved
    return judged + _full_length(variant, case, x)


def _full_length(variant: Variant, case: Case, x: Tensors) -> list[Verdict]:
    bound = bind(variant, case, x)
    saved = bound.forward()
    grads = bound.backward(saved)
    judged = []
    for name, g in grads.items():
        if g is not None:
            finite = all(bool(torch.isfinite(part).all()) for part in g.flatten(0, 1).split(4096))
            judged.append(Verdict(f"{name} finite", 0.0 if finite else float("inf"), 0.0, 0.0, finite))
    # One packed row's first document, or batch row 0: later tokens would only repeat the check with an offset.
    T = case.T // case.docs
    tokens = torch.linspace(0, T - 1, SAMPLES, device="cuda").long()
    exact, low = (_sampled(case, x, variant.depth, tokens, T, t, saved) for t in (torch.float64, torch.bfloat16))
    dq = grads["dq"]
    assert dq is not None
    ours: Values = {"out at T": saved[0][0, tokens], "lse at T": saved[1][0][:, tokens], "dq at T": dq[0, tokens]}  # type: ignore[index]
    for name in ("dk", "dv"):
        if grads.get(name) is not None:
            ours[f"{name} at T"] = grads[name][0, tokens]  # type: ignore[index]
    if variant.depth and case.depth_chunk == 1:
        for name in ("ddepth_k", "ddepth_v"):
            ours[f"{name} at T"] = grads[name][:, 0, tokens]  # type: ignore[index]
    return judged + verdicts({n: ours.get(n) for n in exact}, low, exact)


def _sampled(
    case: Case, x: Tensors, depth: bool, tokens: torch.Tensor, T: int, dtype: torch.dtype, saved: Result
) -> Values:
    """Values of ``tokens`` of row 0 in ``dtype``, keys 0..T. dk and dv use the variant's own output and LSE of all rows."""
    q = x["q"][0, tokens].to(dtype).unflatten(1, (case.Hk, case.G)).requires_grad_()  # type: ignore[index]
    grad_out = x["grad_out"][0, tokens].to(dtype).unflatten(1, (case.Hk, case.G))  # type: ignore[index]
    scale = case.D**-0.5
    parts, leaves = [], {"dq": q}
    if case.sequence:
        k, v = (x[n][0, :T].to(dtype) for n in ("k", "v"))  # type: ignore[index]
        s = torch.einsum("nhgd,thd->hgnt", q, k) * scale
        if case.causal:
            s = s.masked_fill(torch.arange(T, device="cuda")[None, :] > tokens[:, None], float("-inf"))
        parts.append(s)
    if depth:
        first = tokens // case.depth_chunk * case.depth_chunk
        u = first[:, None] + torch.arange(case.depth_chunk, device="cuda")
        hidden = u > tokens[:, None]
        at = slice(None, None, case.every), 0, u.clamp(max=T - 1)
        dk, dv = (slots(x, n, dtype, at).requires_grad_() for n in ("depth_k", "depth_v"))
        s = torch.einsum("nhgd,snchd->hgncs", q, dk) * scale
        parts.append(s.masked_fill(hidden[:, :, None], float("-inf")).flatten(-2))
        if case.depth_chunk == 1:
            leaves.update(ddepth_k=dk, ddepth_v=dv)
    logits = torch.cat(parts, -1)
    lse = torch.logsumexp(logits if dtype == torch.float64 else logits.float(), -1)
    p = logits.softmax(-1)
    out = torch.zeros_like(q)
    if case.sequence:
        out = out + torch.einsum("hgnt,thd->nhgd", p[..., :T], v)
        p = p[..., T:]
    if depth:
        out = out + torch.einsum("hgncs,snchd->nhgd", p.unflatten(-1, (case.depth_chunk, case.S)), dv)
    grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out)))
    values: Values = {"out at T": out.detach().flatten(1, 2), "lse at T": lse.detach().flatten(0, 1)}
    values["dq at T"] = grads["dq"].flatten(1, 2)
    for name in ("ddepth_k", "ddepth_v"):
        if name in grads:
            values[f"{name} at T"] = grads[name].squeeze(2)
    if case.sequence:
        values["dk at T"], values["dv at T"] = _sampled_keys(case, x, tokens, T, dtype, saved)
    return values


def _sampled_keys(
    case: Case, x: Tensors, keys: torch.Tensor, T: int, dtype: torch.dtype, saved: Result
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv ``[n, Hk, D]`` of the sampled keys from the queries 0..T of row 0."""
    scale = case.D**-0.5
    k, v = (x[n][0, keys].to(dtype) for n in ("k", "v"))  # type: ignore[index]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    causal = torch.arange(T, device="cuda")[:, None] >= keys[None, :] if case.causal else None
    for h in range(case.Hk):  # one head at a time: fp64 copies of q and its gradient are large
        group = slice(h * case.G, (h + 1) * case.G)
        q, do, o = (t[0, :T, group].to(dtype) for t in (x["q"], x["grad_out"], saved[0]))  # type: ignore[index]
        lse = saved[1][0, group, :T].T.to(torch.promote_types(dtype, torch.float32))
        p = torch.exp(torch.einsum("tgd,nd->tgn", q, k[:, h]) * scale - lse[..., None]).to(dtype)
        if causal is not None:
            p = p.masked_fill(~causal[:, None, :], 0.0)
        dp = torch.einsum("tgd,nd->tgn", do, v[:, h]) - (do * o).sum(-1, keepdim=True)
        dv[:, h] = torch.einsum("tgn,tgd->nd", p, do)
        dk[:, h] = torch.einsum("tgn,tgd->nd", p * dp, q) * scale
    return dk, dv
