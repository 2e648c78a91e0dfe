"""Norm placements: one file each, listed here. See ``docs/extending.md``."""

from __future__ import annotations

from .peri import Peri
from .placement import NormPlacement
from .post import Post
from .pre import Pre
from .reordered import Reordered

__all__ = ["NormPlacement"]

NormPlacement.register(Pre, Post, Reordered, Peri)
