"""Transformer blocks: the four norm placements, with and without a depth stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from olmo_core.config import StrEnum
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.transformer import TransformerBlock, TransformerBlockConfig, TransformerBlockType
from olmo_core.nn.transformer.block import TransformerBlockBase
from olmo_core.nn.transformer.init import init_linear

from moda_kernels.depth_stream import FFN

from .attention import MoDAAttention, MoDAAttentionConfig
from .depth_kv import DepthProjection

__all__ = ["MoDABlock", "MoDABlockConfig", "NormPlacement", "PlacedBlock"]


class NormPlacement(StrEnum):
    """Where a sublayer f has its norm N."""

    pre = "pre"
    """``x + f(N(x))``"""
    post = "post"
    """``N(x + f(x))``"""
    reordered = "reordered"
    """``x + N(f(x))``, as OLMo2 was released"""
    peri = "peri"
    """``x + N(f(N(x)))``"""


_OLMO_CORE_TYPES = {
    NormPlacement.pre: TransformerBlockType.default,
    NormPlacement.reordered: TransformerBlockType.reordered_norm,
    NormPlacement.peri: TransformerBlockType.peri_norm,
}


@dataclass
class MoDABlockConfig(TransformerBlockConfig):
    """A block with a norm placement; with depth KV if its attention has it.

    Without depth KV the placements that OLMo-core has are built by OLMo-core itself.
    """

    norm_placement: NormPlacement = NormPlacement.reordered

    def build(
        self,
        *,
        d_model: int,
        block_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> TransformerBlockBase:
        assert self.feed_forward is not None and self.layer_norm is not None
        place: dict[str, Any] = dict(d_model=d_model, block_idx=block_idx, n_layers=n_layers)
        place.update(init_device=init_device, cache=cache)
        depth = isinstance(self.sequence_mixer, MoDAAttentionConfig)
        if not depth and self.norm_placement in _OLMO_CORE_TYPES:
            plain = TransformerBlockConfig(
                name=_OLMO_CORE_TYPES[self.norm_placement],
                sequence_mixer=self.sequence_mixer,
                feed_forward=self.feed_forward,
                layer_norm=self.layer_norm,
            )
            return plain.build(**place)
        return (MoDABlock if depth else PlacedBlock)(
            norm_placement=self.norm_placement,
            sequence_mixer=self.sequence_mixer,
            feed_forward=self.feed_forward,
            layer_norm=self.layer_norm,
            **place,
        )

    def num_params(self, d_model: int) -> int:
        """Parameters of one block without its depth projections, which not every layer has."""
        name = _OLMO_CORE_TYPES.get(self.norm_placement, TransformerBlockType.default)
        plain = replace(self, name=name)
        return TransformerBlockConfig.num_params(plain, d_model)


class PlacedBlock(TransformerBlock):
    """OLMo-core's block with any of the four norm placements. Submodules are named as OLMo-core names them."""

    def __init__(self, *, norm_placement: NormPlacement, layer_norm: LayerNormConfig, **kwargs: Any) -> None:
        super().__init__(layer_norm=layer_norm, **kwargs)
        self.norm_placement = norm_placement
        if norm_placement == NormPlacement.peri:
            self.post_attention_norm = layer_norm.build(self.d_model, init_device=kwargs["init_device"])
            self.post_feed_forward_norm = layer_norm.build(self.d_model, init_device=kwargs["init_device"])

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention receives, ``[B, T, d_model]``."""
        return self.attention_norm(x) if self.norm_placement in (NormPlacement.pre, NormPlacement.peri) else x

    def feed_forward_input(self, h: torch.Tensor) -> torch.Tensor:
        """What the FFN receives, ``[B, T, d_model]``."""
        return self.feed_forward_norm(h) if self.norm_placement in (NormPlacement.pre, NormPlacement.peri) else h

    def after_attention(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The residual stream after the attention gave ``out`` for the stream ``x``."""
        if self.norm_placement == NormPlacement.reordered:
            out = self.attention_norm(out)
        elif self.norm_placement == NormPlacement.peri:
            out = self.post_attention_norm(out)
        h = self.attention_residual_stream(x, out)
        return self.attention_norm(h) if self.norm_placement == NormPlacement.post else h

    def after_feed_forward(self, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The residual stream after the FFN gave ``out`` for the stream ``h``."""
        if self.norm_placement == NormPlacement.reordered:
            out = self.feed_forward_norm(out)
        elif self.norm_placement == NormPlacement.peri:
            out = self.post_feed_forward_norm(out)
        h = self.feed_forward_residual_stream(h, out)
        return self.feed_forward_norm(h) if self.norm_placement == NormPlacement.post else h

    def forward(
        self, x: torch.Tensor, *, loss_div_factor: torch.Tensor | float | None = None, **kwargs: Any
    ) -> torch.Tensor:
        del loss_div_factor
        h = self.after_attention(x, self.attention(self.attention_input(x), **kwargs))
        return self.after_feed_forward(h, self.feed_forward(self.feed_forward_input(h)))


class MoDABlock(PlacedBlock):
    """A block whose attention reads the depth stream, and whose attention and FFN write to it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        attention = self.attention
        assert isinstance(attention, MoDAAttention)
        self.ffn_depth_projection: DepthProjection | None = None
        if attention.writes_ffn:
            self.ffn_depth_projection = DepthProjection(
                self.d_model,
                attention.n_kv_heads * attention.head_dim,
                bias=attention.w_k.bias is not None,
                dtype=attention.w_k.weight.dtype,
                init_device=kwargs["init_device"],
            )

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        *,
        token: torch.Tensor,
        control: torch.Tensor,
        loss_div_factor: torch.Tensor | float | None = None,
        cu_doc_lens: torch.Tensor | None = None,
        max_doc_len: int | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        :param x: ``[B, T, d_model]``.
        :param token: the depth stream's last token.
        :param control: ``stream.control[block_idx]``.
        :param cu_doc_lens: int32 ``[N + 1]`` document boundaries of the flattened batch.
        :param max_doc_len: the longest document.
        :param mask: bool ``[B, T, T]``, which sequence keys each query sees, in place of the causal mask; for inference only.

        :returns: ``[B, T, d_model]`` and the next token.
        """
        del loss_div_factor
        att, token = self.attention(
            self.attention_input(x), token=token, control=control, cu_doc_lens=cu_doc_lens, max_doc_len=max_doc_len,
            mask=mask,
        )  # fmt: skip
        h = self.after_attention(x, att)
        u = self.feed_forward_input(h)
        if self.ffn_depth_projection is not None:
            rope = {} if cu_doc_lens is None else {"cu_doc_lens": cu_doc_lens}
            k, v = self.ffn_depth_projection(u)
            k, v = self.attention.depth_slot(k, v, rope, projected=True)
            token = self.attention.write_slot(token, k, v, control, FFN, packed=cu_doc_lens is not None)
        return self.after_feed_forward(h, self.feed_forward(u)), token

    def init_depth_weights(self, *, std: float, generator: torch.Generator | None = None) -> None:
        """Initialise the FFN's depth projection like every other linear."""
        if self.ffn_depth_projection is not None:
            for linear in (self.ffn_depth_projection.w_k, self.ffn_depth_projection.w_v):
                init_linear(linear, std=std, generator=generator)

    def num_flops_per_token(self, seq_len: int) -> int:
        flops = super().num_flops_per_token(seq_len)
        if self.ffn_depth_projection is not None:
            flops += 6 * sum(p.numel() for p in self.ffn_depth_projection.parameters())
        return flops

    def apply_tp(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("depth_kv does not work with tensor parallelism yet")

    def apply_cp(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("depth_kv does not work with context parallelism yet")

    def apply_pp(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("depth_kv does not work with pipeline parallelism yet")
