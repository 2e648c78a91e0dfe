"""Depth mechanisms: one file each, listed here. See ``docs/extending.md``."""

from __future__ import annotations

from .denseformer import DenseFormer
from .mechanism import DepthMechanism
from .moda import MoDA
from .value_residual import ValueResidual

__all__ = ["DepthMechanism"]

DepthMechanism.register(MoDA, ValueResidual, DenseFormer)
