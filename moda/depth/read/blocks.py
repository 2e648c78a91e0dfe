"""Read the last slots of every block of layers."""

from __future__ import annotations

from dataclasses import dataclass

from moda.ranges import Count

from .policy import SlotPolicy


@dataclass(frozen=True)
class Blocks(SlotPolicy):
    """A layer reads the slots of the last layer of every block of ``n`` layers, and of the layer before it.

    This is what block attention residuals attend to (arXiv 2603.15031, section 3.2). The i-th layer of block n sees one
    representation of every finished block and of its own as far as it has come, ``[b_0, ..., b_{n-1}, b_n^{i-1}]``. Here
    the slots of a block's last layer stand for the block, and those of the layer before the reader for the unfinished one.

    :param n: layers in a block.
    """

    name = "blocks"
    n: Count

    def slots(self, layer: int, kinds: int) -> tuple[int, ...]:
        read = (other for other in range(layer) if (other + 1) % self.n == 0 or other == layer - 1)
        return tuple(other * kinds + kind for other in read for kind in range(kinds))

    def describe(self) -> str:
        return f"the last layer of every block of {self.n} layers, and the previous layer"
