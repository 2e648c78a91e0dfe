"""Mixture-of-Depths Attention operators.

Importing this package needs torch only: Triton and every kernel are loaded when a backend that uses them is first asked for.
"""

from __future__ import annotations

from .depth_stream import DepthLayout, DepthStream
from .moda_attention import available_backends, moda_attention

__all__ = ["DepthLayout", "DepthStream", "available_backends", "moda_attention"]
