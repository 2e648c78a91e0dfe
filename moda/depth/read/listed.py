"""Read the slots that are listed for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moda.errors import UserError
from moda.ranges import Range

from .policy import SlotPolicy


@dataclass(frozen=True)
class Listed(SlotPolicy):
    """A layer reads the slots that its list names, whatever chose them.

    :param layers: a list per layer of increasing slot numbers; that of the first layer is empty.
    """

    name = "listed"
    layers: tuple[tuple[Annotated[int, Range(0)], ...], ...]

    def reads(self, n_layers: int, kinds: int) -> tuple[tuple[int, ...], ...]:
        if len(self.layers) != n_layers:
            raise UserError("model.depth.read.listed", f"a list for each of the {n_layers} layers", len(self.layers))
        return super().reads(n_layers, kinds)

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        return self.layers[layer] if layer < len(self.layers) else ()

    def describe(self) -> str:
        return f"{sum(map(len, self.layers))} slots, listed by layer"
