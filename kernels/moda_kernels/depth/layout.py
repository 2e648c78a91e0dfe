"""Which depth slots a model's layers write and read, as data."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from typing import NamedTuple

ATTENTION = 0
FFN = 1


class TrainingRows(NamedTuple):
    """Rows of the buffers of a pass with a backward.

    The backward pass needs the keys and values of every slot until the first of its readers has been differentiated, and the
    slot's gradient from the last of them on. So a gradient can be where the keys (or values) of a later slot were, that nothing
    reads any more: ``shift`` rows after its slot's own keys, the same number for all, so that kernels find both with one table.
    """

    rows: tuple[int, ...]  # of each slot's keys, increasing
    shift: int  # from a slot's keys to its gradient
    total: int  # for keys and gradients together; where sharing saves less than a quarter, it is two separate buffers


@dataclass(frozen=True)
class DepthLayout:
    """What each layer of a model reads of what the layers before it offer.

    A *candidate* is a pair of depth keys and values that a layer could write, numbered ``layer * kinds + kind`` in the order of
    writing. Candidates that some layer reads are written, and have a *slot* in the buffers, numbered in the same order; the
    others do not exist.

    :param reads: for each layer the candidates it reads, strictly increasing, all of layers before it.
    :param kinds: how many candidates a layer has: ``ATTENTION`` alone, or ``ATTENTION`` and ``FFN``.
    :param quantised: whether slots are kept in fp8 with a scale per row (:mod:`..moda_attention.fp8`).

    :raises ValueError: naming the layer whose reads are not possible.
    """

    reads: tuple[tuple[int, ...], ...]
    kinds: int = 2
    quantised: bool = False

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
        """How many slots are written."""
        return len(self._slot_of)

    @functools.cached_property
    def _readers(self) -> tuple[dict[int, int], dict[int, int]]:
        """The first and the last layer that reads each slot."""
        reads = [(slot, layer) for layer, slots in enumerate(self._read_slots) for slot in slots]
        return dict(reversed(reads)), dict(reads)

    def last_reader(self, slot: int) -> int:
        """The last layer that reads a slot."""
        return self._readers[1][slot]

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """The buffer row of each slot in a pass without a backward: a row is used again once its slot has had its last reader."""
        rows: list[int] = [0] * self.n_slots
        free: list[int] = []
        used = 0
        for layer, read in enumerate(self._read_slots):
            for slot in read:
                if self.last_reader(slot) == layer:
                    heapq.heappush(free, rows[slot])
            for kind in range(self.kinds):
                if (written := self.written_slot(layer, kind)) is not None:
                    if not free:
                        free, used = [used], used + 1
                    rows[written] = heapq.heappop(free)
        return tuple(rows)

    @functools.cached_property
    def training(self) -> TrainingRows:
        """Where slots and their gradients are in a pass with a backward. Gradients do not fit into rows of fp8."""
        first, last = self._readers
        best = TrainingRows(tuple(range(self.n_slots)), self.n_slots, 2 * self.n_slots)
        if self.quantised:
            return best
        limit = self.n_slots * 3 // 2 + 1
        at_least = len(self._read_slots[-1])  # gradients that exist while the keys of all slots are needed
        shift = 0
        while self.n_slots + max(shift := shift + 1, at_least) < limit:
            rows: list[int] = []
            held: dict[int, int] = {}
            row = 0
            for slot in range(self.n_slots):
                while row - shift in held and last[held[row - shift]] >= first[slot]:
                    row += 1
                held[row] = slot
                rows.append(row)
                row += 1
                if row + shift >= limit:
                    break
            else:
                best, limit = TrainingRows(tuple(rows), shift, row + shift), row + shift
        return best

    def read_slots(self, layer: int) -> tuple[int, ...]:
        """The slots that a layer reads, in increasing order."""
        return self._read_slots[layer]

    def written_slot(self, layer: int, kind: int) -> int | None:
        """The slot that a layer's attention or FFN writes; None if no layer reads it, or the layout has no such kind."""
        return self._slot_of.get(layer * self.kinds + kind) if kind < self.kinds else None

    def crossing(self, layer: int) -> tuple[int, ...]:
        """The candidates of layers before ``layer`` that it or a later layer reads: what crosses a cut there."""
        return tuple(c for c in self._slot_of if c < layer * self.kinds and self.last_reader(self._slot_of[c]) >= layer)

    @functools.lru_cache(256)  # noqa: B019  (a few layouts per process, each forward pass asks)
    def part(self, first: int, end: int) -> DepthLayout:
        """The layout of the layers ``first <= l < end`` alone, under the same numbers.

        Slots that come from before are written first. One more layer, the last of the result, reads those that later layers need.
        """
        reads = [read if first <= layer < end else () for layer, read in enumerate(self.reads)]
        return DepthLayout((*reads, self.crossing(end)), self.kinds, self.quantised)

    @functools.cached_property
    def slots_read(self) -> int:
        """The sum over layers of the slots they read."""
        return sum(map(len, self.reads))
