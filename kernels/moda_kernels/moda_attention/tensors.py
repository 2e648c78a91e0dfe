"""The tensors that travel between the operator, the depth stream and the backends, as named tuples.

Legend: B batch, T sequence length, Hq query heads, Hk key/value heads, D head dim, S depth slots of the buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Inputs(NamedTuple):
    """What one call reads."""

    q: Tensor  # [B, T, Hq, D]
    k: Tensor | None  # [B, T, Hk, D]; None with v for depth-only attention
    v: Tensor | None
    depth_k: Tensor | None = None  # [S, B, T, Hk, D]; None where no slot is read
    depth_v: Tensor | None = None
    q_depth: Tensor | None = None  # [B, T, Hq, D], the query of the depth branch where it is not q
    scale_k: Tensor | None = None  # fp32 [S, B, T, Hk], the scales of depth tensors in fp8 (:mod:`.fp8`)
    scale_v: Tensor | None = None
    depth_bias: Tensor | None = (
        None  # [n], fp32 or above: added to the scaled logits of the n slots read, in their order
    )

    def with_slots(self, index: Any) -> Inputs:
        """The same with those slots of the depth tensors that ``index`` takes."""
        names = ("depth_k", "depth_v", "scale_k", "scale_v")
        return self._replace(**{n: x[index] for n in names if (x := getattr(self, n)) is not None})

    @property
    def depth_query(self) -> Tensor:
        return self.q if self.q_depth is None else self.q_depth


class Result(NamedTuple):
    """What the forward pass returns, and what it saves for the backward pass beside the inputs."""

    out: Tensor  # [B, T, Hq, D] in q's dtype
    lse: Tensor  # [B, Hq, T] natural-log LSE, fp32 or above


class Gradients(NamedTuple):
    """Gradients of the inputs but for the depth slots; None where there is no such input."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    q_depth: Tensor | None
    depth_bias: Tensor | None = None


class DepthGradients(NamedTuple):
    """Buffers ``[S, B, T, Hk, D]`` that take the gradients of the slots read.

    Of these slots, those at the positions ``fresh[0] <= i < fresh[1]`` are stored, the others added to what is there.
    """

    k: Tensor
    v: Tensor
    fresh: tuple[int, int]


class Pending(Protocol):
    """A backend's room for the depth gradients of ``layers`` layers that are to be added later."""

    layers: int

    def flush(self, layers: tuple[int, int], slots: tuple[int, ...], to: DepthGradients) -> None:
        """Add what the layers ``lo <= i < hi`` have left here for ``slots``; each of them must have left it for all of them.

        :param slots: increasing slot numbers of ``to``'s buffers.
        """
        ...


class Deferred(NamedTuple):
    """Where a backward pass leaves its depth gradients instead of adding them: place ``at`` of ``pending``."""

    pending: Pending
    at: int
    first_slot: int  # the stream's number of the call's slot 0


#: Where a backward pass leaves its depth gradients; None where no slot is read.
DepthTarget = DepthGradients | Deferred | None
