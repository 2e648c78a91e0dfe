"""Read the most recent slots only: depth memory that does not grow with depth."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import SlotPolicy


@dataclass(frozen=True)
class Recent(SlotPolicy):
    """A layer reads the last ``n`` slots written before it.

    :param n: how many.
    """

    name = "recent"
    n: int

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        end = layer * kinds
        return tuple(range(max(0, end - self.n), end))

    def describe(self) -> str:
        return f"the {self.n} most recent slots"
