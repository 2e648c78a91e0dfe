"""Read slots of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moda.errors import UserError

from .policy import SlotPolicy


class SlotKind(str, Enum):
    """Which part of a layer wrote a slot, in the order of writing."""

    attention = "attention"
    ffn = "ffn"


@dataclass(frozen=True)
class Kinds(SlotPolicy):
    """A layer reads all earlier slots of these kinds. The others are not written, and have no parameters.

    :param kinds: ``attention``, ``ffn`` or both, in this order.
    """

    name = "kinds"
    kinds: tuple[SlotKind, ...]

    def __post_init__(self) -> None:
        if not self.kinds or self.kinds != tuple(kind for kind in SlotKind if kind in self.kinds):
            given = [kind.value for kind in self.kinds]
            raise UserError("model.depth.read.kinds", "[attention], [ffn] or [attention, ffn]", given)

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return tuple(s for s in range(layer * kinds) if list(SlotKind)[s % kinds] in self.kinds)

    def describe(self) -> str:
        return f"all slots of {' and '.join(kind.value for kind in self.kinds)}"
