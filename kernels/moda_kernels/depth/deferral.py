"""Deferred depth gradients: which layers have left theirs to be added later, and how they are added.

Adding a layer's depth gradients to all the slots it read is a read-modify-write of every one of them. A backend that can defer
leaves them in a *pending* store instead (:class:`..moda_attention.tensors.Pending`), and one flush adds those of several layers
with a single read-modify-write per slot.
"""

from __future__ import annotations

from typing import NamedTuple

from ..moda_attention.problem import as_run
from ..moda_attention.tensors import Deferred, Pending


class Flush(NamedTuple):
    """One launch: the layers at the indices ``layers[0] <= i < layers[1]`` of the store add to ``slots``."""

    layers: tuple[int, int]
    slots: tuple[int, ...]


class Deferral:
    """The layers in a pending store, and for each the slots whose gradients it has not added yet.

    Slots go by their rows in the stream's buffers.
    """

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self._missing: list[set[int]] = []

    @property
    def full(self) -> bool:
        return len(self._missing) == self.pending.layers

    def add(self, slots: tuple[int, ...]) -> Deferred:
        """Room for one more layer, which read ``slots``."""
        self._missing.append(set(slots))
        # A run is read through a view, whose slot 0 is the run's first; a list by the slots' own numbers.
        return Deferred(self.pending, len(self._missing) - 1, 0 if as_run(slots) is None else slots[0])

    def covers(self, slot: int) -> bool:
        """Whether some layer has not added its gradient of this slot yet."""
        return any(slot in missing for missing in self._missing)

    def take(self, first: int) -> list[Flush]:
        """The flushes that add all that is missing in slots >= ``first``; it counts as added from now on.

        Slots that the same neighbouring layers have to add to share a flush.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for slot in sorted(s for s in set().union(*self._missing) if s >= first):
            layers = [i for i, missing in enumerate(self._missing) if slot in missing]
            start = layers[0]
            for i, after in zip(layers, [*layers[1:], -1]):
                if after != i + 1:
                    groups.setdefault((start, i + 1), []).append(slot)
                    start = after
        self._missing = [{s for s in missing if s < first} for missing in self._missing]
        if not any(self._missing):
            self._missing.clear()
        return [Flush(layers, tuple(slots)) for layers, slots in groups.items()]
