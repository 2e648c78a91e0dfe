"""What a slot policy is."""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

from moda.errors import UserError
from moda.registered import Registered

__all__ = ["SlotPolicy"]


class SlotPolicy(Registered):
    """Which depth slots a layer reads, by name in ``model.depth.read``.

    A policy is a file with a class like this one and a line in ``moda.depth.read``. Slots are numbered in the order in which
    layers could write them: layer 0 attention, layer 0 FFN, layer 1 attention, ...; with one kind of slot per layer: layer 0,
    layer 1, ... What no layer reads is neither computed nor written, and has no parameters. A policy may ask for more slots than
    there are: it reads those that exist.
    """

    family = "slot policy"
    #: Whether the logits of each slot that a layer reads get a trained score, a parameter of the layer.
    scored: ClassVar[bool] = False

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        """The slots that a layer reads, increasing, each below ``layer * kinds`` (what earlier layers could write).

        :param kinds: slots that a layer can write: 1 for attention, 2 for attention and FFN.
        """
        raise NotImplementedError

    def reads(self, n_layers: int, kinds: int) -> tuple[tuple[int, ...], ...]:
        """:meth:`slots` of every layer.

        :raises UserError: for slots that are not increasing, or that no earlier layer writes.
        """
        reads = tuple(self.slots(layer, kinds) for layer in range(n_layers))
        for layer, slots in enumerate(reads):
            end = layer * kinds
            if list(slots) != sorted(set(slots)) or slots and not 0 <= slots[0] <= slots[-1] < end:
                expected = f"increasing slots 0 <= s < {end} for layer {layer} from the policy {self.name}"
                raise UserError("model.depth.read", expected, slots)
        return reads

    @property
    def kept(self) -> int | None:
        """How many of :meth:`slots` a token keeps for each query head, those of the largest logits; None for all."""
        return None

    @property
    def alone(self) -> bool:
        """Whether the policy is more than its :meth:`slots`, and so cannot be part of another one."""
        return self.scored or self.kept is not None

    def describe(self) -> str:
        """What is read, in words."""
        raise NotImplementedError

    #: Colours of the kinds of slots in :meth:`draw`.
    COLOURS: ClassVar[tuple[str, str]] = ("#f58518", "#54a24b")

    def draw(self, axes: Any, n_layers: int, kinds: int) -> None:
        """Draw which layer (row) reads which slot (column) on matplotlib axes."""
        for kind in range(kinds):
            cells = [
                (slot, layer) for layer in range(n_layers) for slot in self.slots(layer, kinds) if slot % kinds == kind
            ]
            label = ("attention", "FFN")[kind]
            axes.scatter(*(zip(*cells) if cells else ((), ())), marker="s", s=24, color=self.COLOURS[kind], label=label)
        axes.set(
            xlabel="slot",
            ylabel="reading layer",
            xlim=(-1, n_layers * kinds),
            ylim=(n_layers, -1),
        )
        axes.set_title(textwrap.fill(self.describe(), 48), fontsize=10)
        axes.legend(loc="upper right", frameon=False)
