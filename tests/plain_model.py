"""A MoDA decoder written the obvious way, from a state dict: a list of slots, explicit softmax, plain autograd.

It shares no code with the project, so that both must be wrong in the same way for a test to pass.
"""

from __future__ import annotations

import math

import torch

Slot = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def rms(x: torch.Tensor, gain: torch.Tensor | None, eps: float = 1e-6) -> torch.Tensor:
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return x if gain is None else x * gain


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE of ``[B, T, H, D]`` at positions 0..T-1 (halves convention)."""
    T, D = x.shape[1], x.shape[-1]
    # OLMo-core makes its angles in fp32, whatever the model's dtype.
    freqs = 1.0 / (theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D))
    angle = torch.outer(torch.arange(T, dtype=torch.float32), freqs)
    cos, sin = angle.cos()[None, :, None].to(x.dtype), angle.sin()[None, :, None].to(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def plain_logits(
    p: dict[str, torch.Tensor],
    ids: torch.Tensor,
    *,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    placement: str,
    head_norm: bool,
    depth: dict | None,
    other: str | None = None,
    dilation: int = 1,
    theta: float = 500_000.0,
) -> torch.Tensor:
    """Logits ``[B, T, V]``. ``depth``: MoDA's attention, ffn, key_norm, rope, slots, or None.

    :param other: another mechanism, ``value_residual`` or ``denseformer`` (with its ``dilation``), from its paper's equation.
    """
    group = n_heads // n_kv_heads
    h = p["embeddings.weight"][ids]
    B, T, _ = h.shape
    slots: list[Slot] = []
    first_values: list[torch.Tensor] = []
    outputs = [h]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def qk_norm(x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        if head_norm:
            return rms(x.reshape(B, T, -1, head_dim), gain)
        return rms(x, gain).reshape(B, T, -1, head_dim)

    def make_slot(k: torch.Tensor, v: torch.Tensor, gain: torch.Tensor, projected: bool) -> Slot:
        """Keys as a reader will see them but for a reader's gain, which has to be applied by the reader."""
        assert depth is not None
        v = v.reshape(B, T, n_kv_heads, head_dim)
        if depth["key_norm"] == "reader":
            k = qk_norm(k, None)
            return k, v, None
        if depth["key_norm"] == "none" and projected:
            k = k.reshape(B, T, n_kv_heads, head_dim)
        else:
            k = qk_norm(k, gain)
        return (rotate(k, theta) if depth["rope"] == "same_position" else k), v, None

    def attention(x: torch.Tensor, name: str, layer: int) -> torch.Tensor:
        rq, rk, rv = (linear(x, f"{name}.{w}") for w in ("w_q", "w_k", "w_v"))
        q = rotate(qk_norm(rq, p[f"{name}.q_norm.weight"]), theta)
        k = rotate(qk_norm(rk, p[f"{name}.k_norm.weight"]), theta)
        v = rv.reshape(B, T, n_kv_heads, head_dim)
        if other == "value_residual":
            first_values.append(v)
            if layer > 0:
                own, first = p[f"blocks.{layer}.depth.weights"]
                v = own * v + first * first_values[0]
        seen = slots if depth is None or depth["slots"] is None else slots[max(0, len(slots) - depth["slots"]) :]
        if depth is not None and "reads" in depth:  # any slots: a function of the layer and the kinds of slots
            seen = [slots[i] for i in depth["reads"](layer, 2 if depth["ffn"] else 1)]
        out = torch.zeros(B, T, n_heads, head_dim, dtype=x.dtype)
        for head in range(n_heads):
            kv = head // group
            s = q[:, :, head] @ k[:, :, kv].transpose(1, 2) / math.sqrt(head_dim)
            s = s.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            values = []
            for dk, dv, _ in seen:
                key = dk[:, :, kv]
                if depth is not None and depth["key_norm"] == "reader":
                    gain = p[f"{name}.k_norm.weight"]
                    key = key * (gain if head_norm else gain[kv * head_dim : (kv + 1) * head_dim])
                    if depth["rope"] == "same_position":
                        key = rotate(key[:, :, None], theta)[:, :, 0]
                s = torch.cat([s, (q[:, :, head] * key).sum(-1, keepdim=True) / math.sqrt(head_dim)], dim=-1)
                values.append(dv[:, :, kv])
            w = s.softmax(-1)
            o = w[..., :T] @ v[:, :, kv]
            for i, value in enumerate(values):
                o = o + w[..., T + i, None] * value
            out[:, :, head] = o
        if depth is not None and layer < n_layers - 1:
            gain = p[f"{name}.k_norm.weight"]
            if depth["attention"] == "project":
                d = f"{name.removesuffix('.attention')}.depth.attention_slot"
                if f"{d}.w_k.weight" in p:
                    slots.append(make_slot(linear(x, f"{d}.w_k"), linear(x, f"{d}.w_v"), gain, True))
                else:  # no layer reads it
                    slots.append((torch.full_like(k, math.nan), v, None))
            else:
                slots.append(make_slot(rk, rv, gain, False))
        return linear(out.reshape(B, T, -1), f"{name}.w_out")

    def ffn(u: torch.Tensor, name: str) -> torch.Tensor:
        f = f"{name}.feed_forward"
        return linear(torch.nn.functional.silu(linear(u, f"{f}.w1")) * linear(u, f"{f}.w3"), f"{f}.w2")

    for layer in range(n_layers):
        b = f"blocks.{layer}"
        na, nf = p[f"{b}.attention_norm.weight"], p[f"{b}.feed_forward_norm.weight"]
        enters = placement in ("pre", "peri")
        a = attention(rms(h, na) if enters else h, f"{b}.attention", layer)
        if placement == "reordered":
            a = rms(a, na)
        if placement == "peri":
            a = rms(a, p[f"{b}.post_attention_norm.weight"])
        h = h + a
        if placement == "post":
            h = rms(h, na)
        u = rms(h, nf) if enters else h
        if depth is not None and depth["ffn"] and layer < n_layers - 1:
            d = f"{b}.depth.ffn_slot"
            if f"{d}.w_k.weight" in p:
                gain = p[f"{b}.attention.k_norm.weight"]
                slots.append(make_slot(linear(u, f"{d}.w_k"), linear(u, f"{d}.w_v"), gain, True))
            else:  # no layer reads it
                slots.append((torch.full((B, T, n_kv_heads, head_dim), math.nan), h, None))
        f = ffn(u, b)
        if placement == "reordered":
            f = rms(f, nf)
        if placement == "peri":
            f = rms(f, p[f"{b}.post_feed_forward_norm.weight"])
        h = h + f
        if placement == "post":
            h = rms(h, nf)
        if other == "denseformer":
            outputs.append(h)
            read = [x for j, x in enumerate(outputs) if j % dilation == (layer + 1) % dilation]
            h = torch.stack([a * x for a, x in zip(p[f"depth.averages.{layer}"], read)]).sum(0)
            assert len(read) == len(p[f"depth.averages.{layer}"])
    return rms(h, p["lm_head.norm.weight"]) @ p["lm_head.w_out.weight"].T
