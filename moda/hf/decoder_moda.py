"""A MoDA decoder in plain PyTorch, with a key/value cache: what an exported folder carries along.

Imports nothing but torch. Token t of layer l attends, under one softmax, to the sequence's keys 0..t (cached from step to step)
and to the depth slots that earlier layers wrote for the same token t. Depth slots have no cross-token term: they live inside
one call and are never cached. See arXiv 2603.15619.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

Slot = tuple[torch.Tensor, torch.Tensor]


class Cache(Protocol):
    """What the decoder asks of a cache: Hugging Face's, or :class:`KVCache`."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> Any: ...

    def get_seq_length(self) -> int: ...


class KVCache:
    """Keys and values ``[B, Hk, T, D]`` of every layer so far."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> Any:
        """Append a layer's new keys and values and return all of them."""
        if layer_idx == len(self.layers):
            self.layers.append((key_states, value_states))
        else:
            k, v = self.layers[layer_idx]
            self.layers[layer_idx] = (torch.cat([k, key_states], dim=2), torch.cat([v, value_states], dim=2))
        return self.layers[layer_idx]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.layers[0][0].shape[2] if self.layers else 0


class MoDARMSNorm(nn.Module):
    """RMSNorm computed in fp32 or above."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight.to(_wide(x)) * self.scaled(x)).to(x.dtype)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """``x / rms(x)``, in fp32 or above, without the gain."""
        x = x.to(_wide(x))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class DepthLayout:
    """Which slots a model writes and reads, in order of writing: layer 0 attention, layer 0 FFN, layer 1 attention, ...

    :param window: how many of the most recent slots a layer reads; None for all. What no layer reads is not written.
    """

    def __init__(self, n_layers: int, ffn: bool, window: int | None) -> None:
        self.n_layers, self.per_layer, self.window = n_layers, 2 if ffn else 1, window

    def first_read(self, layer: int) -> int:
        """The first slot, counted over all that could be written, that a layer reads."""
        return 0 if self.window is None else max(0, layer * self.per_layer - self.window)

    def writes(self, layer: int, kind: int) -> bool:
        """Whether a layer's attention (0) or FFN (1) writes a slot that some layer reads."""
        return (
            kind < self.per_layer
            and layer + 1 < self.n_layers
            and (self.first_read(layer + 1) <= layer * self.per_layer + kind)
        )


class DepthProjection(nn.Module):
    """One depth K/V pair from a tensor of the block."""

    def __init__(self, hidden_size: int, width: int, bias: bool) -> None:
        super().__init__()
        self.k_proj = nn.Linear(hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, width, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_proj(x), self.v_proj(x)


def rotary(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[B, T, 1, D]``, fp32, of positions ``[B, T]``."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[..., None].float() * (1.0 / (theta ** (steps / head_dim)))
    angle = torch.cat([angle, angle], dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE of ``[B, T, H, D]``, halves convention, in fp32 or above."""
    wide = x.to(_wide(x))
    cos, sin = (t.to(wide.dtype) for t in cos_sin)
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class MoDAAttention(nn.Module):
    """Attention over cached sequence keys and the depth slots of the current tokens."""

    def __init__(self, config: Any, layer: int, layout: DepthLayout | None) -> None:
        super().__init__()
        self.layer, self.layout = layer, layout
        self.n_heads, self.n_kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.kind, self.qk_norm = config.depth_attention, config.qk_norm
        self.key_norm, self.rotate_depth = config.depth_key_norm, config.depth_rope == "same_position"
        d, bias = config.hidden_size, config.use_bias
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, q_width, bias=bias)
        self.k_proj = nn.Linear(d, kv_width, bias=bias)
        self.v_proj = nn.Linear(d, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, d, bias=bias)
        if self.qk_norm != "none":
            head = self.qk_norm == "head"
            self.q_norm = MoDARMSNorm(self.head_dim if head else q_width, config.rms_norm_eps)
            self.k_norm = MoDARMSNorm(self.head_dim if head else kv_width, config.rms_norm_eps)
        if self.kind == "project" and layout is not None and layout.writes(layer, 0):
            self.depth_proj = DepthProjection(d, kv_width, bias)

    def _normed(self, x: torch.Tensor, norm: MoDARMSNorm | None, gain: bool = True) -> torch.Tensor:
        """QK-norm of ``[B, T, H * D]``, over everything or per head; ``[B, T, H, D]``."""
        if self.qk_norm == "head":
            x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            x = norm(x) if gain else norm.scaled(x).to(x.dtype)
        return x if self.qk_norm == "head" else x.unflatten(-1, (-1, self.head_dim))

    def slot(self, raw: Slot, cos_sin: Any, projected: bool) -> Slot:
        """Depth keys and values ``[B, T, Hk, D]``, as later layers read them, of raw ones ``[B, T, Hk * D]``."""
        k, v = raw
        if self.key_norm == "reader":
            k = self._normed(k, self.k_norm, gain=False)
        else:
            plain = self.qk_norm == "none" or (self.key_norm == "none" and projected)
            k = self._normed(k, None if plain else self.k_norm)
        return (rotate(k, cos_sin) if self.rotate_depth else k), v.unflatten(-1, (-1, self.head_dim))

    def _with_reader_gain(self, q: torch.Tensor) -> torch.Tensor:
        gain = self.k_norm.weight.view(-1, self.head_dim)
        if gain.shape[0] > 1:
            gain = gain.repeat_interleave(self.n_heads // self.n_kv_heads, dim=0)
        return (q.to(_wide(q)) * gain.to(_wide(q))).to(q.dtype)

    def forward(
        self, x: torch.Tensor, slots: list[Slot], cos_sin: Any, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        """``[B, T, hidden]`` of ``[B, T, hidden]``; this layer's own slot is appended to ``slots``."""
        B, T, _ = x.shape
        raw_k, raw_v = self.k_proj(x), self.v_proj(x)
        with_norm = self.qk_norm != "none"
        q = self._normed(self.q_proj(x), self.q_norm if with_norm else None)
        k = rotate(self._normed(raw_k, self.k_norm if with_norm else None), cos_sin)
        v = raw_v.unflatten(-1, (-1, self.head_dim))
        q_depth = None
        if self.kind is not None and self.key_norm == "reader":
            q_depth = rotate(self._with_reader_gain(q), cos_sin) if self.rotate_depth else None
            q = rotate(q, cos_sin)
            q_depth = self._with_reader_gain(q) if q_depth is None else q_depth
        else:
            q = rotate(q, cos_sin)
            q_depth = q

        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        group = self.n_heads // self.n_kv_heads
        wide = _wide(x)
        scale = 1.0 / math.sqrt(self.head_dim)
        grouped = q.transpose(1, 2).unflatten(1, (self.n_kv_heads, group)).to(wide)  # [B, Hk, G, T, D]
        logits = torch.einsum("bkgtd,bksd->bkgts", grouped, keys.to(wide)) * scale
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
        read = self._read(slots)
        if read:
            depth_k = torch.stack([s[0] for s in read]).to(wide)  # [S, B, T, Hk, D]
            depth_v = torch.stack([s[1] for s in read]).to(wide)
            by_group = q_depth.unflatten(2, (self.n_kv_heads, group)).to(wide)  # [B, T, Hk, G, D]
            depth_logits = torch.einsum("btkgd,sbtkd->bkgts", by_group, depth_k) * scale
            weights = torch.cat([logits, depth_logits], dim=-1).softmax(-1)
            weights, depth_weights = weights.split([logits.shape[-1], len(read)], dim=-1)
            out = torch.einsum("bkgts,bksd->btkgd", weights, values.to(wide))
            out = out + torch.einsum("bkgts,sbtkd->btkgd", depth_weights, depth_v)
        else:
            out = torch.einsum("bkgts,bksd->btkgd", logits.softmax(-1), values.to(wide))
        self._write(slots, x, (raw_k, raw_v), (k, v), cos_sin)
        return self.o_proj(out.to(x.dtype).reshape(B, T, -1))

    def _read(self, slots: list[Slot]) -> list[Slot]:
        if self.layout is None or self.layout.window is None:
            return slots
        return slots[max(0, len(slots) - self.layout.window) :]

    def _write(self, slots: list[Slot], x: torch.Tensor, raw: Slot, rotated: Slot, cos_sin: Any) -> None:
        if self.layout is None or self.kind is None or self.layer + 1 == self.layout.n_layers:
            return
        if self.kind == "project":
            # A slot that no layer reads has no projection; a place holder keeps the count right.
            written = self.layout.writes(self.layer, 0)
            slots.append(self.slot(self.depth_proj(x), cos_sin, True) if written else rotated)
        elif self.key_norm == "reader" or not self.rotate_depth:
            slots.append(self.slot(raw, cos_sin, False))
        else:
            slots.append(rotated)


class MoDAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.use_bias
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoDALayer(nn.Module):
    """A block with one of four norm placements: ``pre``, ``post``, ``reordered``, ``peri``."""

    def __init__(self, config: Any, layer: int, layout: DepthLayout | None) -> None:
        super().__init__()
        self.placement, self.layer, self.layout = config.norm_placement, layer, layout
        self.self_attn = MoDAAttention(config, layer, layout)
        self.mlp = MoDAMLP(config)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = MoDARMSNorm(d, eps)
        self.feedforward_norm = MoDARMSNorm(d, eps)
        if self.placement == "peri":
            self.post_attention_norm = MoDARMSNorm(d, eps)
            self.post_feedforward_norm = MoDARMSNorm(d, eps)
        if layout is not None and layout.writes(layer, 1):
            width = config.num_key_value_heads * config.head_dim
            self.ffn_depth_proj = DepthProjection(d, width, config.use_bias)

    def _add(self, x: torch.Tensor, out: torch.Tensor, norm: nn.Module, after: nn.Module | None) -> torch.Tensor:
        if self.placement == "reordered":
            return x + norm(out)
        if after is not None:
            return x + after(out)
        return norm(x + out) if self.placement == "post" else x + out

    def forward(
        self, x: torch.Tensor, slots: list[Slot], cos_sin: Any, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        enters, peri = self.placement in ("pre", "peri"), self.placement == "peri"
        out = self.self_attn(self.attention_norm(x) if enters else x, slots, cos_sin, mask, cache)
        h = self._add(x, out, self.attention_norm, self.post_attention_norm if peri else None)
        u = self.feedforward_norm(h) if enters else h
        if self.layout is not None and self.layout.per_layer == 2 and self.layer + 1 < self.layout.n_layers:
            if self.layout.writes(self.layer, 1):
                slots.append(self.self_attn.slot(self.ffn_depth_proj(u), cos_sin, True))
            else:
                slots.append(slots[-1])  # read by no layer: a place holder
        return self._add(h, self.mlp(u), self.feedforward_norm, self.post_feedforward_norm if peri else None)


def causal_mask(
    attention_mask: torch.Tensor | None, batch: int, new: int, past: int, device: torch.device
) -> torch.Tensor:
    """Which keys a new token sees: bool ``[B, new, past + new]``; padding keys (0 in ``attention_mask``) only itself."""
    total = past + new
    at = torch.arange(past, total, device=device)[:, None]
    mask = (torch.arange(total, device=device)[None] <= at)[None].expand(batch, -1, -1)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, :total].bool()
        own = torch.arange(total, device=device)[None] == at
        mask = mask | own[None]  # a padding token attends to itself, so that no row is empty
    return mask


class DecoderParts:
    """Embedding, layers and final norm, and how they run, for a class that is an ``nn.Module``.

    ``config`` is any object with the fields of ``configuration_moda.py``.
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: MoDARMSNorm

    def build(self, config: Any) -> None:
        """Make the submodules."""
        self.head_dim, self.theta = config.head_dim, config.rope_base
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        n = config.num_hidden_layers
        layout = DepthLayout(n, config.depth_ffn, config.depth_slots) if config.depth_attention is not None else None
        self.layers = nn.ModuleList(MoDALayer(config, i, layout) for i in range(n))
        self.norm = MoDARMSNorm(config.hidden_size, config.rms_norm_eps)

    def run(
        self,
        embedded: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Final hidden states ``[B, T, hidden]`` of the new tokens' embeddings ``[B, T, hidden]``.

        :param attention_mask: ``[B, past + T]``, 0 for padding (on the left when generating).
        :param position_ids: ``[B, T]``; counted from the cache and the mask if None.
        """
        B, T, _ = embedded.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + T]
            else:
                position_ids = torch.arange(past, past + T, device=embedded.device)[None]
        cos_sin = rotary(position_ids, self.head_dim, self.theta)
        mask = causal_mask(attention_mask, B, T, past, embedded.device)
        slots: list[Slot] = []
        h = embedded
        for layer in self.layers:
            h = layer(h, slots, cos_sin, mask, cache)
        return self.norm(h)


class MoDADecoder(DecoderParts, nn.Module):
    """The decoder with its head, for use without transformers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.build(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits ``[B, T, vocab]`` of new ids ``[B, T]``."""
        return self.lm_head(self.run(self.embed_tokens(ids), cache=cache))
