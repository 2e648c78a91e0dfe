"""Decoders as model sections describe them: subclasses of OLMo-core's transformer, block and attention."""

from .lm_head import PaddedLMHead, PaddedLMHeadConfig
from .transformer import DepthTransformer, ModelTransformerConfig, transformer_config

__all__ = ["DepthTransformer", "ModelTransformerConfig", "PaddedLMHead", "PaddedLMHeadConfig", "transformer_config"]
