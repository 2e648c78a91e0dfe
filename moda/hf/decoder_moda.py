"""The decoder of a model section in plain PyTorch, with a key/value cache: what an exported folder carries.

The depth mechanism and the norm placement are the very files that training uses. Tokens of a call are new tokens: their keys and
values join the cache, while what a mechanism keeps (depth slots, block outputs) belongs to a token's own pass through the
layers and is thrown away after it. Blocks take tensors and return tensors, so that device maps can move them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from moda.config.model import ModelConfig
from moda.depth.mechanism import DepthLayer, DepthModel, Received, State
from moda.placements.placement import receive_each
from moda_kernels.depth.layout import DepthLayout
from moda_kernels.moda_attention.fp8 import rounded
from moda_kernels.sources.naive import NaiveSums
from moda_kernels.sources.stream import Sources


class Cache(Protocol):
    """What the decoder asks of a cache of Hugging Face's."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> Any: ...

    def get_seq_length(self) -> int: ...


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class MoDARMSNorm(nn.Module):
    """RMSNorm computed in fp32 or above."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(_wide(x))
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(wide.dtype) * scaled).to(x.dtype)


def rotary(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[B, T, 1, D]``, fp32, of positions ``[B, T]``."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[..., None].float() * (1.0 / (theta ** (steps / head_dim)))
    angle = torch.cat([angle, angle], dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of ``[B, T, H, D]``, halves convention, in fp32 or above."""
    wide = x.to(_wide(x))
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos.to(wide.dtype) + torch.cat([-b, a], dim=-1) * sin.to(wide.dtype)).to(x.dtype)


class MoDAAttention(nn.Module):
    """The linears and norms of an attention; :class:`_Steps` says what is done with them."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        assert model.n_kv_heads is not None and model.head_dim is not None
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = (
            layer,
            model.n_heads,
            model.n_kv_heads,
            model.head_dim,
        )
        q_width, kv_width = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        self.q_proj = nn.Linear(model.d_model, q_width, bias=model.bias)
        self.k_proj = nn.Linear(model.d_model, kv_width, bias=model.bias)
        self.v_proj = nn.Linear(model.d_model, kv_width, bias=model.bias)
        self.o_proj = nn.Linear(q_width, model.d_model, bias=model.bias)
        self.per_head = model.qk_norm.value == "head"
        self.q_norm = self.k_norm = None
        if model.qk_norm.value != "none":
            self.q_norm = MoDARMSNorm(model.head_dim if self.per_head else q_width, model.norm_eps)
            self.k_norm = MoDARMSNorm(model.head_dim if self.per_head else kv_width, model.norm_eps)


class _Steps:
    """The decoding side of :class:`moda.depth.mechanism.AttentionHost`. A slot in the state is a pair ``[B, T, Hk, D]``.

    No module itself: module hooks move their arguments to a device, and must leave the attention where it is.
    """

    def __init__(self, attention: MoDAAttention) -> None:
        self.attention = attention
        self.n_heads, self.n_kv_heads, self.head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self._weights: list[torch.Tensor | None] = [None, None]

    @property
    def weights(self) -> torch.Tensor | None:
        """The attention's probabilities ``[B, Hq, T, keys + S]``, of the keys and then of the S depth slots.

        They add up to 1. Where slots have a softmax of their own, both parts do (the second with a token's own pair, if any).
        """
        given = [x for x in self._weights if x is not None]
        return torch.cat(given, dim=-1) if given else None

    def linear(self, x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x) for linear in linears)

    def gain(self, norm: Any) -> torch.Tensor:
        ones = torch.ones(
            self.head_dim * (1 if self.attention.per_head else self.n_kv_heads), device=norm.weight.device
        )
        if norm.weight.device.type == "meta":  # offloaded: only a call brings the weights
            ones = torch.ones_like(ones, device="cpu")
        return norm(ones.to(_wide(norm.weight))) * math.sqrt(1 + norm.eps)

    def project(self, x: Received) -> tuple[torch.Tensor, ...]:
        parts = x if isinstance(x, tuple) else (x, x, x)
        linears = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        return tuple(linear(part) for linear, part in zip(linears, parts, strict=True))

    def normalise(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        if self.attention.per_head:
            x = x.unflatten(-1, (-1, self.head_dim))
        x = x if norm is None else norm(x)
        return x if self.attention.per_head else x.unflatten(-1, (-1, self.head_dim))

    def rotate(self, q: torch.Tensor, k: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotate(q, *context["rotary"]), _rotate(k, *context["rotary"])

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
        return self.attend_with_slots(q, k, v, None, (), context)[0]

    def attend_with_slots(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_depth: torch.Tensor | None,
        state: State,
        context: Mapping[str, Any],
        top: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if context["cache"] is not None:
            keys, values = context["cache"].update(keys, values, self.attention.layer)
        wide, groups = _wide(q), (self.n_kv_heads, self.n_heads // self.n_kv_heads)
        scale = 1.0 / math.sqrt(self.head_dim)
        grouped = q.unflatten(2, groups).to(wide)  # [B, T, Hk, G, D]
        logits = torch.einsum("btkgd,bksd->bkgts", grouped, keys.to(wide)) * scale
        mask = F.pad(context["mask"], (0, keys.shape[2] - context["mask"].shape[-1]))  # a static cache is longer
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
        n = keys.shape[2]
        if state:
            by_group = grouped if q_depth is None else q_depth.unflatten(2, groups).to(wide)
            depth, depth_v = self._depth_logits(by_group, state, top, bias)
            logits = torch.cat([logits, depth], dim=-1)
        weights = logits.softmax(-1)
        self._weights[0] = weights.flatten(1, 2).to(q.dtype)
        out = torch.einsum("bkgts,bksd->btkgd", weights[..., :n], values.to(wide))
        if state:
            out = out + torch.einsum("bkgts,sbtkd->btkgd", weights[..., n:], depth_v)
        return out.flatten(2, 3).to(q.dtype), state

    def attend_slots(
        self,
        q: torch.Tensor,
        own: State | None,
        state: State,
        context: Mapping[str, Any],
        top: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        if not state:
            return torch.zeros_like(q) if own is None else own[1], state
        grouped = q.unflatten(2, (self.n_kv_heads, -1)).to(_wide(q))
        logits, values = self._depth_logits(grouped, state, top, bias)
        if own is not None:
            logit, value = self._depth_logits(grouped, own)
            logits, values = torch.cat([logits, logit], dim=-1), torch.cat([values, value])
        weights = logits.softmax(-1)
        among = weights[..., : len(state) // 2].flatten(1, 2).to(q.dtype)
        self._weights[1] = among.repeat_interleave(self.n_heads // q.shape[2], dim=1)
        return torch.einsum("bkgts,sbtkd->btkgd", weights, values).flatten(2, 3).to(q.dtype), state

    @staticmethod
    def _depth_logits(
        grouped: torch.Tensor, state: State, top: int | None = None, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, Hk, G, T, S]`` of queries ``[B, T, Hk, G, D]``, and values ``[S, B, T, Hk, D]``, of the slots."""
        keys, values = (torch.stack(state[i::2]).to(grouped.dtype) for i in (0, 1))
        logits = torch.einsum("btkgd,sbtkd->bkgts", grouped, keys) / math.sqrt(grouped.shape[-1])
        if bias is not None:
            logits = logits + bias[: len(keys)]
        if top is not None and top < len(keys):
            logits = logits.masked_fill(logits < logits.topk(top).values[..., -1:], -math.inf)
        return logits, values

    def write_slot(
        self, k: torch.Tensor, v: torch.Tensor, kind: int, state: State, context: Mapping[str, Any]
    ) -> State:
        return (*state, k, v)

    def output(self, out: torch.Tensor) -> torch.Tensor:
        return self.attention.o_proj(out.flatten(2))


class _Slots:
    """The slot memory of decoding: pairs of tensors by slot number. See :class:`moda.depth.mechanism.SlotMemory`.

    :param rounds: whether slots are rounded to fp8 where the layout says so.
    """

    def __init__(self, layout: DepthLayout, rounds: bool) -> None:
        self.layout, self.rounds = layout, rounds and layout.quantised
        self.slots: dict[int, State] = {}

    def enter(self, layer: int) -> State:
        return tuple(x for slot in self.layout.read_slots(layer) for x in self.slots[slot])

    def leave(self, layer: int, state: State) -> None:
        written = [self.layout.written_slot(layer, kind) for kind in range(self.layout.kinds)]
        read = self.layout.read_slots(layer)
        new = tuple(rounded(x) if self.rounds else x for x in state[2 * len(read) :])
        for slot in read:
            if self.layout.last_reader(slot) == layer:
                del self.slots[slot]
        for i, slot in enumerate(slot for slot in written if slot is not None):
            self.slots[slot] = new[2 * i : 2 * i + 2]


class MoDAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.d_model, model.ffn_hidden_size, bias=model.bias)
        self.up_proj = nn.Linear(model.d_model, model.ffn_hidden_size, bias=model.bias)
        self.down_proj = nn.Linear(model.ffn_hidden_size, model.d_model, bias=model.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoDALayer(nn.Module):
    """A block: attention and FFN, each with the norms of its placement, through the depth mechanism."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.placement = model.norm_placement
        self.self_attn = MoDAAttention(model, layer)
        self.mlp = MoDAMLP(model)
        for sublayer in ("attention", "feed_forward"):
            for name in self.placement.norm_names(sublayer):
                self.add_module(name, MoDARMSNorm(model.d_model, model.norm_eps))
        self.depth = DepthLayer() if model.depth is None else model.depth.build_layer(model, layer)

    def forward(
        self,
        stream: Any,
        state: State,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        cache: Cache | None = None,
    ) -> tuple[Any, State, torch.Tensor | None]:
        """The stream and the mechanism's state after the block, and its attention's ``weights``."""
        steps, context = _Steps(self.self_attn), {"rotary": rotary, "mask": mask, "cache": cache}
        for sublayer in ("attention", "feed_forward"):
            norms = [getattr(self, name) for name in self.placement.norm_names(sublayer)]
            received, kept = self.depth("before", sublayer, stream)
            x = receive_each(self.placement, received, norms)
            if sublayer == "attention":
                out, state = self.depth("attend", steps, x, state, context)
            else:
                out, state = self.depth("feed_forward", lambda x: self.mlp(x), steps, x, state, context)
            add = functools.partial(self._add, sublayer, kept)
            stream = self.placement.combine(stream, out, norms, add)
        return stream, state, steps.weights

    def _add(self, sublayer: str, kept: State, stream: Any, out: torch.Tensor) -> Any:
        return self.depth("after", sublayer, stream, out, kept)


def causal_mask(
    attention_mask: torch.Tensor | None, batch: int, new: int, past: int, device: torch.device
) -> torch.Tensor:
    """Which keys a new token sees: bool ``[B, new, past + new]``; padding keys (0 in ``attention_mask``) only itself.

    A mask ``[B, 1, new, keys]``, as transformers makes it for static caches, is taken as it is: bool, or 0 where a key is seen.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
    total = past + new
    at = torch.arange(past, total, device=device)[:, None]
    mask = (torch.arange(total, device=device)[None] <= at)[None].expand(batch, -1, -1)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, :total].bool()
        own = torch.arange(total, device=device)[None] == at
        mask = mask | own[None]  # a padding token attends to itself, so that no row is empty
    return mask


class DecoderParts:
    """Embedding, layers, depth mechanism and final norm, and how they run, for a class that is an ``nn.Module``."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    depth: DepthModel
    norm: MoDARMSNorm

    def build(self, model: ModelConfig, round_slots: bool = False) -> None:
        """Make the submodules.

        :param round_slots: whether depth slots are rounded to fp8 where the section says so.
        """
        self.round_slots = round_slots
        assert model.vocab_size is not None and model.head_dim is not None
        self.head_dim, self.theta = model.head_dim, float(model.rope_theta)
        self.embed_tokens = nn.Embedding(model.vocab_size, model.d_model)
        self.layers = nn.ModuleList(MoDALayer(model, i) for i in range(model.n_layers))
        self.depth = DepthModel() if model.depth is None else model.depth.build_model(model)
        self.norm = MoDARMSNorm(model.d_model, model.norm_eps)

    def open_slots(self, layout: DepthLayout, device: torch.device) -> _Slots:
        """See :class:`moda.depth.mechanism.Host`."""
        return _Slots(layout, self.round_slots)

    def open_sources(self, n: int, device: torch.device) -> Sources:
        """See :class:`moda.depth.mechanism.Host`."""
        return Sources(n, lambda x: NaiveSums(), device)

    def run(
        self,
        embedded: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        streams: list[Any] | None = None,
        attentions: list[Any] | None = None,
    ) -> torch.Tensor:
        """Final hidden states ``[B, T, hidden]`` of the new tokens' embeddings ``[B, T, hidden]``.

        :param attention_mask: ``[B, past + T]``, 0 for padding (on the left when generating).
        :param position_ids: ``[B, T]``; counted from the cache and the mask if None.
        :param streams: takes the residual stream before every block.
        :param attentions: takes every block's attention probabilities.
        """
        B, T, _ = embedded.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + T]
            else:
                position_ids = torch.arange(past, past + T, device=embedded.device)[None]
        angles = rotary(position_ids, self.head_dim, self.theta)
        mask = causal_mask(attention_mask, B, T, past, embedded.device)
        stream, forward_pass = self.depth.begin(embedded, self)
        for i, layer in enumerate(self.layers):
            stream, state = forward_pass.enter(i, stream)
            if streams is not None:
                streams.append(stream)
            stream, state, weights = layer(stream, state, angles, mask, cache=cache)
            if attentions is not None:
                attentions.append(weights)
            stream = forward_pass.leave(i, stream, state)
        return self.norm(forward_pass.finish(stream))
