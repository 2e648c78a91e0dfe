"""What policies share that pick the best slots of another policy's."""

from __future__ import annotations

from dataclasses import dataclass

from moda.errors import UserError
from moda.ranges import Count

from .all_slots import All
from .policy import SlotPolicy


@dataclass(frozen=True)
class TopSlots(SlotPolicy):
    """Layers compute the logits of all slots of another policy.

    :param top: how many are picked.
    :param of: the policy that they are picked from.
    """

    top: Count
    of: SlotPolicy = All()

    def __post_init__(self) -> None:
        if self.of.alone:
            key = f"model.depth.read.{self.name}.of"
            raise UserError(key, "a policy that is not dynamic or learned", self.of.to_plain())

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return self.of.slots(layer, kinds)
