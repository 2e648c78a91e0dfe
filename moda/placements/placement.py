"""What a norm placement is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from moda.registered import Registered

__all__ = ["Add", "NormPlacement", "Norms", "receive_each"]

#: The norms of one sublayer, in the order of :attr:`NormPlacement.norms`.
Norms = Sequence[Callable[[Any], Any]]
#: How a sublayer's output joins the residual stream: ``add(stream, output)`` is the new stream.
Add = Callable[[Any, Any], Any]


class NormPlacement(Registered):
    """Where a sublayer f (attention or FFN) has its norms, by name in ``model.norm_placement``.

    A placement is a file with a class like this one and a line in ``moda.placements``. Training, the exported model
    and the tests ask it what a sublayer receives and what becomes of its output.
    """

    family = "norm placement"
    #: The placement as a formula of the stream x, the sublayer f and norms N.
    formula: ClassVar[str]
    #: Names of the norms that each sublayer owns. The first is the block's ``attention_norm`` or ``feed_forward_norm``,
    #: any other ``<name>_attention_norm`` and ``<name>_feed_forward_norm``.
    norms: ClassVar[tuple[str, ...]] = ("",)
    #: OLMo-core's block type of the same placement, which then builds plain models; None if it has none.
    olmo_core_block: ClassVar[str | None] = None

    def receive(self, x: Any, norms: Norms) -> Any:
        """What the sublayer receives, of the stream ``[..., d_model]``."""
        return x

    def combine(self, x: Any, out: Any, norms: Norms, add: Add) -> Any:
        """The stream after the sublayer gave ``out`` for the stream ``x``."""
        raise NotImplementedError

    @classmethod
    def norm_names(cls, sublayer: str) -> tuple[str, ...]:
        """Names of a block's norms for ``attention`` or ``feed_forward``."""
        return tuple(f"{name}_{sublayer}_norm".lstrip("_") for name in cls.norms)


def receive_each(placement: NormPlacement, x: Any, norms: Norms) -> Any:
    """What a sublayer receives of a tensor, or of each of a tuple's: an attention's inputs for queries, keys and values."""
    return tuple(placement.receive(part, norms) for part in x) if isinstance(x, tuple) else placement.receive(x, norms)
