"""Slot policies: one file each, listed here. See ``docs/extending.md``."""

from __future__ import annotations

from .all_slots import All
from .blocks import Blocks
from .combined import Intersect, Union
from .dynamic import Dynamic
from .first_recent import FirstRecent
from .kinds import Kinds
from .learned import Learned
from .listed import Listed
from .policy import SlotPolicy
from .recent import Recent
from .stride import Stride

__all__ = [
    "All", "Blocks", "Dynamic", "FirstRecent", "Intersect", "Kinds", "Learned", "Listed", "Recent", "SlotPolicy", "Stride",
    "Union",
]  # fmt: skip

SlotPolicy.register(All, Recent, FirstRecent, Stride, Kinds, Blocks, Union, Intersect, Listed, Dynamic, Learned)
