"""Configuration of an exported MoDA model (remote code: imports transformers only)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MoDAConfig(PretrainedConfig):
    """A decoder with Mixture-of-Depths Attention (arXiv 2603.15619), or a plain OLMo2-like one.

    :param norm_placement: ``pre``, ``post``, ``reordered`` or ``peri``.
    :param qk_norm: ``full``, ``head`` or ``none``.
    :param use_bias: whether the linears of the blocks have biases.
    :param rope_base: theta of the rotary embedding.
    :param depth_attention: ``reuse``, ``project``, or None for a model without a depth stream.
    :param depth_ffn: whether FFN inputs give depth slots.
    :param depth_key_norm: ``writer``, ``reader`` or ``none``.
    :param depth_rope: ``same_position`` or ``none``.
    :param depth_slots: how many of the most recent slots a layer reads; None for all.
    """

    model_type = "moda"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 1024,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 64,
        intermediate_size: int = 4096,
        rms_norm_eps: float = 1e-6,
        rope_base: float = 500_000.0,
        max_position_embeddings: int = 4096,
        norm_placement: str = "post",
        qk_norm: str = "full",
        use_bias: bool = False,
        depth_attention: str | None = "reuse",
        depth_ffn: bool = True,
        depth_key_norm: str = "writer",
        depth_rope: str = "same_position",
        depth_slots: int | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_base = rope_base
        self.max_position_embeddings = max_position_embeddings
        self.norm_placement = norm_placement
        self.qk_norm = qk_norm
        self.use_bias = use_bias
        self.depth_attention = depth_attention
        self.depth_ffn = depth_ffn
        self.depth_key_norm = depth_key_norm
        self.depth_rope = depth_rope
        self.depth_slots = depth_slots
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]
