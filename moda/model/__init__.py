"""OLMo2 decoders with depth KV, as subclasses of OLMo-core's transformer, block and attention."""

from .attention import MoDAAttention, MoDAAttentionConfig
from .block import MoDABlock, MoDABlockConfig, NormPlacement, PlacedBlock
from .depth_kv import DepthAttention, DepthKeyNorm, DepthKVConfig, DepthRoPE
from .lm_head import PaddedLMHead, PaddedLMHeadConfig
from .transformer import MoDATransformer, MoDATransformerConfig

__all__ = [
    "DepthAttention",
    "DepthKVConfig",
    "DepthKeyNorm",
    "DepthRoPE",
    "MoDAAttention",
    "MoDAAttentionConfig",
    "MoDABlock",
    "MoDABlockConfig",
    "MoDATransformer",
    "MoDATransformerConfig",
    "NormPlacement",
    "PaddedLMHead",
    "PaddedLMHeadConfig",
    "PlacedBlock",
]
