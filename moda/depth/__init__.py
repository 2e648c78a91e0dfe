"""Depth mechanisms: one file each, listed here. See ``docs/extending.md``."""

from __future__ import annotations

from .attention_residuals import AttentionResiduals
from .denseformer import DenseFormer
from .hyper_connections import HyperConnections
from .mechanism import DepthMechanism
from .mhc import MHC
from .moda import MoDA
from .value_residual import ValueResidual

__all__ = ["DepthMechanism"]

DepthMechanism.register(MoDA, ValueResidual, DenseFormer, HyperConnections, MHC, AttentionResiduals)
