"""Read every n-th slot."""

from __future__ import annotations

from dataclasses import dataclass

from moda.ranges import Count

from .policy import SlotPolicy


@dataclass(frozen=True)
class Stride(SlotPolicy):
    """A layer reads the slots 0, n, 2n, ... and the most recent one.

    With slots of attention and FFN, an odd ``n`` takes both kinds in turn, an even one attention slots only.

    :param n: the stride.
    """

    name = "stride"
    n: Count

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        end = layer * kinds
        return tuple(s for s in range(end) if s % self.n == 0 or s == end - 1)

    def describe(self) -> str:
        return f"slots 0, {self.n}, {2 * self.n}, ... and the most recent one"
