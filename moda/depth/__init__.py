"""Depth mechanisms: one file each, listed here. See ``docs/extending.md``."""

from __future__ import annotations

from .attention_residuals import AttentionResiduals
from .delta_residuals import DeltaResiduals
from .denseformer import DenseFormer
from .depth_attention import DepthAttention
from .depth_only import DepthOnly
from .hyper_connections import HyperConnections
from .mechanism import DepthMechanism
from .mhc import MHC
from .moda import MoDA
from .mudd import MUDD
from .value_residual import ValueResidual

__all__ = ["DepthMechanism"]

DepthMechanism.register(
    MoDA, ValueResidual, DenseFormer, HyperConnections, MHC, AttentionResiduals, DeltaResiduals, MUDD, DepthAttention,
    DepthOnly,
)  # fmt: skip
