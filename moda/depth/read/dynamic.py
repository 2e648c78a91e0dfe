"""Read the slots that fit a token best."""

from __future__ import annotations

from dataclasses import dataclass

from moda.errors import UserError
from moda.ranges import Count

from .all_slots import All
from .policy import SlotPolicy


@dataclass(frozen=True)
class Dynamic(SlotPolicy):
    """Each token and query head reads the ``top`` slots of the largest logits among those of another policy.

    Exact: all logits are computed and the others leave the softmax (slots that tie with the last one stay). So no K is saved,
    only V, and only the reference backend can do it. Slots that a token leaves out get no gradient from it.

    :param top: how many.
    :param of: the policy that they are chosen from.
    """

    name = "dynamic"
    top: Count
    of: SlotPolicy = All()

    def __post_init__(self) -> None:
        if self.of.alone:
            raise UserError(
                "model.depth.read.dynamic.of", "a policy that is not dynamic or learned", self.of.to_plain()
            )

    @property
    def kept(self) -> int:
        return self.top

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return self.of.slots(layer, kinds)

    def describe(self) -> str:
        return f"the {self.top} slots of the largest logits, of {self.of.describe()}"
