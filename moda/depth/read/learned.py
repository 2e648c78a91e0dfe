"""Read slots with a trained score each, by which a few of them are then chosen for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .listed import Listed
from .top import TopSlots


@dataclass(frozen=True)
class Learned(TopSlots):
    """A warm-up: a layer reads what another policy reads, and a trained score per slot is added to the slot's logits.

    ``moda choose`` ends it: each layer goes on with the ``top`` slots of the largest scores, and without the scores.

    :param top: how many slots a layer is to keep.
    :param of: the policy that they are chosen from.
    """

    name = "learned"
    scored = True

    def choose(self, scores: Sequence[Sequence[float]], kinds: int) -> Listed:
        """The ``top`` slots of each layer, where scores are equal the most recent ones.

        :param scores: those of every layer, in the order of the slots that it reads; what is left over is passed over.
        """
        reads = self.reads(len(scores), kinds)
        best = (sorted(zip(own, read))[-self.top :] for own, read in zip(scores, reads))
        return Listed(tuple(tuple(sorted(slot for _, slot in layer)) for layer in best))

    def describe(self) -> str:
        return f"{self.of.describe()}, with scores to choose {self.top} per layer"
