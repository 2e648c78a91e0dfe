"""Read the slots that fit a token best."""

from __future__ import annotations

from dataclasses import dataclass

from .top import TopSlots


@dataclass(frozen=True)
class Dynamic(TopSlots):
    """Each token and query head reads the ``top`` slots of the largest logits among those of another policy.

    Exact: all logits are computed and the others leave the softmax (slots that tie with the last one stay). So no K is saved,
    only V, and only the reference backend can do it. Slots that a token leaves out get no gradient from it.

    :param top: how many.
    :param of: the policy that they are chosen from.
    """

    name = "dynamic"

    @property
    def kept(self) -> int:
        return self.top

    def describe(self) -> str:
        return f"the {self.top} slots of the largest logits, of {self.of.describe()}"
