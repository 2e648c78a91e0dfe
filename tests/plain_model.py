"""A MoDA decoder written the obvious way, from a state dict: a list of slots, explicit softmax, plain autograd.

It shares no code with the project, so that both must be wrong in the same way for a test to pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Slot = tuple[torch.Tensor, torch.Tensor]  # keys and values [B, T, Hk, D]


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


#: What becomes of the stream ``x`` at a sublayer ``f``, by norm placement, with the gains of the sublayer's norms.
PLACEMENTS: dict[str, Callable] = {
    "pre": lambda x, f, gains: x + f(rms(x, gains[0])),
    "post": lambda x, f, gains: rms(x + f(x), gains[0]),
    "reordered": lambda x, f, gains: x + rms(f(x), gains[0]),
    "peri": lambda x, f, gains: x + rms(f(rms(x, gains[0])), gains[1]),
}


def fp8(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 numbers times a scale per row ``x[..., :]``; the gradient passes as if nothing were rounded."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).to(x.dtype)
    rounded = (x.float() / scale.float()).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return x + (rounded - x).detach()


@dataclass
class PlainDecoder:
    """A decoder of the parameters ``p``; one object computes one forward pass.

    :param depth: MoDA's attention, ffn, key_norm, rope and, unless all slots are read, ``reads``: a function of the layer and
        the kinds of slots; ``top``: how many of the largest logits stay; ``apart``: under a softmax of their own; ``fp8``: slots
        rounded to it; or None.
    :param other: another mechanism, ``value_residual``, ``denseformer`` (with its ``dilation``) or ``depth_attention`` (with
        ``stride`` and ``recent``), from its paper's equation.
    """

    p: dict[str, torch.Tensor]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    placement: str
    head_norm: bool
    depth: dict | None
    other: str | None = None
    dilation: int = 1
    stride: int = 1
    recent: int = 0
    theta: float = 500_000.0
    slots: list[Slot] = field(default_factory=list)
    first_values: list[torch.Tensor] = field(default_factory=list)
    mixed: list[Slot] = field(default_factory=list)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, T, V]`` of ids ``[B, T]``."""
        place, p = PLACEMENTS[self.placement], self.p
        h = p["embeddings.weight"][ids]
        outputs = [h]
        for layer in range(self.n_layers):
            for sublayer, f in (("attention", self.attention), ("feed_forward", self.ffn)):
                names = f"blocks.{layer}.{sublayer}_norm.weight", f"blocks.{layer}.post_{sublayer}_norm.weight"
                h = place(h, lambda x, f=f, layer=layer: f(x, layer), [p.get(name) for name in names])
            if self.other == "denseformer":
                outputs.append(h)
                read = [x for j, x in enumerate(outputs) if j % self.dilation == (layer + 1) % self.dilation]
                h = torch.stack([a * x for a, x in zip(p[f"depth.averages.{layer}"], read)]).sum(0)
                assert len(read) == len(p[f"depth.averages.{layer}"])
        return rms(h, p["lm_head.norm.weight"]) @ p["lm_head.w_out.weight"].T

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def qk_norm(self, x: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        return rms(self.heads(x), gain) if self.head_norm else self.heads(rms(x, gain))

    def write(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, projected: bool) -> None:
        """Write keys as a reader will see them but for a reader's gain, which has to be applied by the reader."""
        assert self.depth is not None
        v = self.heads(v)
        if self.depth.get("value_norm"):
            v = v / (x.square().mean(-1) + 1e-6).sqrt()[..., None, None]
        if self.depth["key_norm"] == "reader":
            self.slots.append((self.qk_norm(k, None), v))
            return
        kept = fp8 if self.depth.get("fp8") else lambda x: x
        if self.depth["key_norm"] == "none" and projected:
            k = self.heads(k)
        else:
            k = self.qk_norm(k, self.p[f"blocks.{layer}.attention.k_norm.weight"])
        k = rotate(k, self.theta) if self.depth["rope"] == "same_position" else k
        self.slots.append((kept(k), kept(v)))

    def project(self, x: torch.Tensor, layer: int, kind: str) -> None:
        name = f"blocks.{layer}.depth.{kind}_slot"
        if f"{name}.w_k.weight" in self.p:
            self.write(x, self.linear(x, f"{name}.w_k"), self.linear(x, f"{name}.w_v"), layer, True)
        else:  # no layer reads it
            self.slots.append((torch.tensor(math.nan), torch.tensor(math.nan)))

    def seen(self, layer: int) -> list[Slot]:
        """The slots that a layer reads."""
        if self.depth is None or "reads" not in self.depth:
            return self.slots
        return [self.slots[i] for i in self.depth["reads"](layer, 2 if self.depth["ffn"] else 1)]

    def attention(self, x: torch.Tensor | tuple[torch.Tensor, ...], layer: int) -> torch.Tensor:
        """Of one input, or of one each for queries, keys and values."""
        inputs = x if isinstance(x, tuple) else (x, x, x)
        x = inputs[0]
        name = f"blocks.{layer}.attention"
        q_gain, k_gain = self.p[f"{name}.q_norm.weight"], self.p[f"{name}.k_norm.weight"]
        raw_q, raw_k, raw_v = (self.linear(x, f"{name}.{w}") for x, w in zip(inputs, ("w_q", "w_k", "w_v")))
        q, k = rotate(self.qk_norm(raw_q, q_gain), self.theta), rotate(self.qk_norm(raw_k, k_gain), self.theta)
        v = self.heads(raw_v)
        if self.other == "value_residual":
            self.first_values.append(v)
            if layer > 0:
                own, first = self.p[f"blocks.{layer}.depth.weights"]
                v = own * v + first * self.first_values[0]
        T, D, group = x.shape[1], self.head_dim, self.n_heads // self.n_kv_heads
        if self.other == "depth_attention":
            mean = q.reshape(*k.shape[:3], group, D).mean(3)
            own = [(k, v)]
            among = [s for i, s in enumerate(self.mixed) if i % self.stride == 0 or i >= layer - self.recent] + own
            p = torch.stack([(mean * key).sum(-1) / math.sqrt(D) for key, _ in among], -1).softmax(-1)
            v = torch.stack([p[..., i, None] * value for i, (_, value) in enumerate(among)]).sum(0)
            self.mixed.append((k, v))
        out = torch.zeros_like(q)
        for head in range(self.n_heads):
            kv = head // group
            s = q[:, :, head] @ k[:, :, kv].transpose(1, 2) / math.sqrt(D)
            s = s.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            values = []
            for depth_k, depth_v in self.seen(layer):
                key = depth_k[:, :, kv]
                if self.depth is not None and self.depth["key_norm"] == "reader":
                    key = key * (k_gain if self.head_norm else k_gain[kv * D : (kv + 1) * D])
                    if self.depth["rope"] == "same_position":
                        key = rotate(key[:, :, None], self.theta)[:, :, 0]
                logit = (q[:, :, head] * key).sum(-1, keepdim=True) / math.sqrt(D)
                if (scores := self.p.get(f"blocks.{layer}.depth.scores")) is not None:
                    logit = logit + scores[len(values)]
                s = torch.cat([s, logit], dim=-1)
                values.append(depth_v[:, :, kv])
            top = None if self.depth is None else self.depth.get("top")
            if top is not None and len(values) > top:
                least = s[..., T:].sort(-1, descending=True).values[..., top - 1, None]
                s = torch.cat([s[..., :T], s[..., T:].masked_fill(s[..., T:] < least, -math.inf)], dim=-1)
            apart = self.depth is not None and self.depth.get("apart")
            parts = s.split([T, s.shape[-1] - T], -1) if apart else [s]
            w = torch.cat([part.softmax(-1) for part in parts], -1)
            out[:, :, head] = w[..., :T] @ v[:, :, kv] + sum(
                w[..., T + i, None] * value for i, value in enumerate(values)
            )
        if self.depth is not None and layer < self.n_layers - 1:
            if self.depth["attention"] == "project":
                self.project(x, layer, "attention")
            else:
                self.write(x, raw_k, raw_v, layer, False)
        return self.linear(out.flatten(2), f"{name}.w_out")

    def ffn(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if self.depth is not None and self.depth["ffn"] and layer < self.n_layers - 1:
            self.project(x, layer, "ffn")
        f = f"blocks.{layer}.feed_forward"
        return self.linear(torch.nn.functional.silu(self.linear(x, f"{f}.w1")) * self.linear(x, f"{f}.w3"), f"{f}.w2")
