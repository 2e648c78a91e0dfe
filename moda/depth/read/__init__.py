"""Slot policies: one file each, listed here. See ``docs/extending.md``."""

from __future__ import annotations

from .all_slots import All
from .policy import SlotPolicy
from .recent import Recent

__all__ = ["All", "Recent", "SlotPolicy"]

SlotPolicy.register(All, Recent)
