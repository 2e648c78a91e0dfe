"""Read the first and the most recent slots."""

from __future__ import annotations

from dataclasses import dataclass

from moda.ranges import Count

from .policy import SlotPolicy


@dataclass(frozen=True)
class FirstRecent(SlotPolicy):
    """A layer reads the first ``first`` slots of the model and the last ``recent`` ones written before it.

    :param first: how many of the first.
    :param recent: how many of the most recent.
    """

    name = "first_recent"
    first: Count
    recent: Count

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        end = layer * kinds
        return tuple(s for s in range(end) if s < self.first or s >= end - self.recent)

    def describe(self) -> str:
        return f"the first {self.first} and the {self.recent} most recent slots"
