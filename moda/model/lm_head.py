"""A language-model head whose matrix has more rows than the vocabulary (faster matrix products)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from olmo_core.nn.lm_head import LMHead, LMHeadConfig, LMLossImplementation

__all__ = ["PaddedLMHead", "PaddedLMHeadConfig"]


class _PaddedLinear(nn.Linear):
    """A linear whose last ``padding`` outputs are computed and dropped: they never reach a softmax."""

    padding: int = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[..., : self.out_features - self.padding]


@dataclass
class PaddedLMHeadConfig(LMHeadConfig):
    """:param padding: rows of the head beyond the vocabulary."""

    padding: int = 0

    def build(self, *, d_model: int, vocab_size: int, init_device: str = "cpu") -> LMHead:
        """Build the head. ``vocab_size`` counts the padding, the head's own ``vocab_size`` does not."""
        if self.padding == 0:
            return LMHeadConfig(
                layer_norm=self.layer_norm,
                bias=self.bias,
                dtype=self.dtype,
                loss_implementation=self.loss_implementation,
            ).build(d_model=d_model, vocab_size=vocab_size, init_device=init_device)
        if self.loss_implementation != LMLossImplementation.default:
            raise ValueError("a padded vocabulary needs the default loss implementation (the fused one reads all rows)")
        return PaddedLMHead(
            padding=self.padding,
            d_model=d_model,
            vocab_size=vocab_size - self.padding,
            layer_norm=self.layer_norm,
            dtype=self.dtype.as_pt(),
            bias=True if self.bias is None else self.bias,
            init_device=init_device,
        )


class PaddedLMHead(LMHead):
    """OLMo-core's head over ``vocab_size`` tokens with ``padding`` further rows in its matrix."""

    def __init__(self, *, padding: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        old = self.w_out
        self.w_out = _PaddedLinear(
            old.in_features,
            old.out_features + padding,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
            device=old.weight.device,
        )
        self.w_out.padding = padding
