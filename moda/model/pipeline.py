"""The schedule of a pipeline: microbatches through the stages, one process each.

One forward, one backward (1F1B, arXiv 1806.03377): stage s of N begins with N - 1 - s forward passes and then takes turns, so it
has at most N - s microbatches in flight. Every microbatch has a depth stream of its own on every stage.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from olmo_core.nn.lm_head import LMOutputWithLoss
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from .stages import Stage, run_stage

__all__ = ["Pipeline"]

Shapes = Sequence[tuple[int, ...]]


class _Channel:
    """Tensors to one neighbour and from the other, in order. All of a group's go the same way."""

    def __init__(self, group: dist.ProcessGroup, to: int | None, source: int | None) -> None:
        self.group, self.to, self.source = group, to, source
        self._tags: defaultdict[tuple[int | None, int | None], itertools.count[int]] = defaultdict(itertools.count)
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensors: Sequence[torch.Tensor], to: int | None = None) -> None:
        """Begin to send."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        for x in tensors:
            x = x.detach().contiguous()
            peer = self.to if to is None else to
            work = dist.isend(x, group=self.group, group_dst=peer, tag=next(self._tags[None, peer]))
            self._sent.append((work, x))

    def receive(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, source: int | None = None
    ) -> list[torch.Tensor]:
        """Receive what was sent first of what has not been received."""
        out = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        peer = self.source if source is None else source
        works = [dist.irecv(x, group=self.group, group_src=peer, tag=next(self._tags[peer, None])) for x in out]
        for work in works:
            cast(Any, work).wait()
        return out

    def finish(self) -> None:
        """Wait until all is sent."""
        while self._sent:
            self._sent.popleft()[0].wait()


class Pipeline:
    """One rank's stage, and its exchange with its neighbours.

    :param model: what :func:`.stages.cut` left.
    :param down: the ranks of this pipeline, in the order of stages. :param up: a second group of the same ranks: with one for
        each direction no message waits for one that goes the other way.
    :param dtype: of what crosses cuts: that of the model's arithmetic.
    """

    def __init__(
        self, model: torch.nn.Module, down: dist.ProcessGroup, up: dist.ProcessGroup, dtype: torch.dtype
    ) -> None:
        self.model, self.group, self.dtype = model, down, dtype
        self.stage: Stage = cast(Any, model).stage
        s = self.stage
        before, after = None if s.is_first else s.index - 1, None if s.is_last else s.index + 1
        self.down, self.up = _Channel(down, after, before), _Channel(up, before, after)
        self._in_flight: deque[tuple[list[torch.Tensor], Any, list[torch.Size]]] = deque()

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    def _run(self, batch: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[list[torch.Tensor], Any]:
        """A forward pass: what was received for it, and what became of it."""
        s, received = self.stage, []
        if not s.is_first:
            size, length = batch["input_ids"].shape
            shapes = s.shapes(s.received, size, length, packed="doc_lens" in batch)
            received = self.down.receive(shapes, self.dtype, self.device)
            for x in received:
                x.requires_grad_(torch.is_grad_enabled())
        of_last = () if s.is_last else ("labels",)
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", *of_last)}
        out = run_stage(self.model, batch["input_ids"], tuple(received), **rest, **options)
        for slots in received[1:]:
            slots.untyped_storage().resize_(0)  # the stream has them: only their gradient is of use now
        return received, out

    def _send(self, out: Sequence[torch.Tensor]) -> None:
        assert all(x.dtype == self.dtype for x in out)
        self.down.send(out)

    def _forward(self, batch: Mapping[str, Any], options: Mapping[str, Any]) -> LMOutputWithLoss | None:
        received, out = self._run(batch, options)
        if self.stage.is_last:
            self._in_flight.append((received, out.loss, []))
            return cast(LMOutputWithLoss, out._replace(loss=out.loss.detach()))
        # What was sent need not be kept: its place in the graph is.
        self._in_flight.append((received, [get_gradient_edge(x) for x in out], [x.shape for x in out]))
        self._send(out)
        return None

    def _backward(self) -> None:
        received, out, shapes = self._in_flight.popleft()
        if self.stage.is_last:
            out.backward()
        else:
            torch.autograd.backward(out, self.up.receive(shapes, self.dtype, self.device))
        del out
        self.up.send([cast(torch.Tensor, x.grad) for x in received])

    def train(self, microbatches: Sequence[Mapping[str, Any]], **options: Any) -> list[LMOutputWithLoss]:
        """Forward and backward pass of microbatches; the gradients of the stage's parameters are added up.

        :param microbatches: with ``input_ids [B, T]``, ``labels``, and what else the model takes. Every stage is given all.
        :param options: for every forward pass.

        :returns: on the last stage each one's losses, else nothing.
        """
        losses: list[LMOutputWithLoss] = []
        count = len(microbatches)
        ahead = min(self.stage.count - 1 - self.stage.index, count)
        for i in range(count + ahead):
            if i < count and (out := self._forward(microbatches[i], options)) is not None:
                losses.append(out)
            if i >= ahead:
                self._sync(last=i == count + ahead - 1)
                self._backward()
        assert not self._in_flight
        self.down.finish()
        self.up.finish()
        return losses

    def _sync(self, last: bool) -> None:
        """As between microbatches without a pipeline: FSDP adds up copies of the model at the last one alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_requires_all_reduce(last)

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """A forward pass; the model's result on the last stage, else None."""
        _, out = self._run(batch, options)
        if self.stage.is_last:
            return out
        self._send(out)
        self.down.finish()
        return None

    def share_tied_gradient(self) -> None:
        """Give the two copies of a tied embedding, on the first and on the last stage, the sum of their gradients."""
        s = self.stage
        if not (s.is_first or s.is_last):
            return
        weight = self.model.embeddings.weight  # type: ignore[union-attr]
        grad = cast(torch.Tensor, weight.grad)
        own = grad.to_local() if hasattr(grad, "to_local") else grad
        if s.is_last:
            self.up.send([own], to=0)
            (total,) = self.down.receive([own.shape], own.dtype, own.device, source=0)
            own.copy_(total)
        else:
            (other,) = self.up.receive([own.shape], own.dtype, own.device, source=s.count - 1)
            own += other
            self.down.send([own], to=s.count - 1)
        self.down.finish()
        self.up.finish()
