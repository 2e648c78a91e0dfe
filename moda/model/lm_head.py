"""A language-model head whose loss never holds the logits, and whose matrix may have more rows than the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.nn.lm_head import LMHead, LMHeadConfig, LMLossImplementation, LMOutputWithLoss

from .loss import linear_cross_entropy

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
        if self.loss_implementation != LMLossImplementation.default:
            raise ValueError("the loss here needs no logits in its default implementation")
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
    """OLMo-core's head over ``vocab_size`` tokens with ``padding`` further rows in its matrix.

    The loss is computed without the logits (:mod:`moda.model.loss`), except where they are asked for, one loss per token is to be
    differentiated, only some positions are wanted, the head has a bias, or tensor parallelism splits its matrix.

    :ivar logits_with_losses: whether losses per token come with logits where ``return_logits`` is not given.
    """

    logits_with_losses: bool = True

    def __init__(self, *, padding: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not padding:
            return
        old = self.w_out
        self.w_out = _PaddedLinear(
            old.in_features,
            old.out_features + padding,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
            device=old.weight.device,
        )
        self.w_out.padding = padding

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        ignore_index: int = -100,
        loss_reduction: str = "mean",
        z_loss_multiplier: float | None = None,
        loss_div_factor: torch.Tensor | float | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> torch.Tensor | LMOutputWithLoss:
        """OLMo-core's head. A loss that is one number comes with logits only for ``return_logits=True``."""
        some = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        per_token = loss_reduction == "none"
        if per_token and return_logits is None:
            return_logits = self.logits_with_losses
        if labels is None or return_logits or some or self.tp_enabled or self.w_out.bias is not None or (
            per_token and torch.is_grad_enabled()
        ):  # fmt: skip
            return super().forward(
                x,
                labels=labels,
                ignore_index=ignore_index,
                loss_reduction=loss_reduction,  # type: ignore[arg-type]
                z_loss_multiplier=z_loss_multiplier,
                loss_div_factor=loss_div_factor,
                return_logits=return_logits,
                logits_to_keep=logits_to_keep,
            )
        labels = get_local_tensor(labels).reshape(-1)
        h = x if self.norm is None else self.norm(x)
        loss, *parts = linear_cross_entropy(
            get_local_tensor(h).reshape(-1, self.d_model),
            get_local_tensor(self.w_out.weight),
            labels,
            vocab=self.vocab_size,
            ignore_index=ignore_index,
            z_loss=z_loss_multiplier,
        )
        ce, z = parts
        if per_token:
            loss = ce + z
        else:
            ce, z = ce.sum(), z.sum()
            if loss_reduction == "mean":
                count = (labels != ignore_index).sum()
                loss, ce, z = loss / count, ce / count, z / count
        loss, ce, z = (
            self._finalize_loss(v, len(x), loss_reduction=loss_reduction, loss_div_factor=loss_div_factor)
            for v in (loss, ce, z)
        )
        return LMOutputWithLoss(None, loss, ce, None if z_loss_multiplier is None else z)
