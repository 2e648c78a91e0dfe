"""Which depth slots a model's layers write and read, as data."""

from __future__ import annotations

import functools
from dataclasses import dataclass

ATTENTION = 0
FFN = 1


@dataclass(frozen=True)
class DepthLayout:
    """What each layer of a model reads of what the layers before it offer.

    A *candidate* is a pair of depth keys and values that a layer could write, numbered ``layer * kinds + kind`` in the order of
    writing. Candidates that some layer reads are written, and have a *slot* in the buffers, numbered in the same order; the
    others do not exist.

    :param reads: for each layer the candidates it reads, strictly increasing, all of layers before it.
    :param kinds: how many candidates a layer has: ``ATTENTION`` alone, or ``ATTENTION`` and ``FFN``.

    :raises ValueError: naming the layer whose reads are not possible.
    """

    reads: tuple[tuple[int, ...], ...]
    kinds: int = 2

    def __post_init__(self) -> None:
        if self.kinds < 1:
            raise ValueError(f"DepthLayout: kinds must be >= 1, got {self.kinds}")
        if not self.reads:
            raise ValueError("DepthLayout: reads must have an entry per layer, got none")
        object.__setattr__(self, "reads", tuple(map(tuple, self.reads)))
        for layer, read in enumerate(self.reads):
            if any(a >= b for a, b in zip(read, read[1:])):
                raise ValueError(f"DepthLayout: reads of layer {layer} must be strictly increasing, got {read}")
            if read and not 0 <= read[0] <= read[-1] < layer * self.kinds:
                expected = f"candidates of the layers before it, 0 <= c < {layer * self.kinds}"
                raise ValueError(f"DepthLayout: reads of layer {layer} must be {expected}, got {read}")

    @property
    def n_layers(self) -> int:
        return len(self.reads)

    @functools.cached_property
    def _slot_of(self) -> dict[int, int]:
        """The slot of each candidate that is read."""
        return {candidate: slot for slot, candidate in enumerate(sorted(set().union(*self.reads)))}

    @functools.cached_property
    def _read_slots(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(map(self._slot_of.__getitem__, read)) for read in self.reads)

    @property
    def n_slots(self) -> int:
        """S of the buffers."""
        return len(self._slot_of)

    def read_slots(self, layer: int) -> tuple[int, ...]:
        """The slots that a layer reads, in increasing order."""
        return self._read_slots[layer]

    def written_slot(self, layer: int, kind: int) -> int | None:
        """The slot that a layer's attention or FFN writes; None if no layer reads it, or the layout has no such kind."""
        return self._slot_of.get(layer * self.kinds + kind) if kind < self.kinds else None

    @functools.cached_property
    def slots_read(self) -> int:
        """The sum over layers of the slots they read."""
        return sum(map(len, self.reads))
