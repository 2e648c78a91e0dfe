"""Read every slot: the paper's MoDA."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import SlotPolicy


@dataclass(frozen=True)
class All(SlotPolicy):
    """A layer reads all slots of the layers before it."""

    name = "all"

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return tuple(range(layer * kinds))

    def describe(self) -> str:
        return "all slots of earlier layers"
