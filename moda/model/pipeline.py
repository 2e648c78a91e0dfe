"""The schedule of a pipeline: microbatches through the stages.

One forward, one backward (1F1B, arXiv 1806.03377): with one stage each, rank r of R begins with R - 1 - r forward passes and then
takes turns, so it has at most R - r microbatches in flight. With several stages each, stage i on rank i % R, R microbatches at a
time go through a rank's first stage, then its second (interleaved 1F1B, arXiv 2104.04473). Every microbatch has a depth stream of
its own on every stage.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from olmo_core.nn.lm_head import LMOutputWithLoss
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .stages import Slots, Stage, run_stage

__all__ = ["Pipeline", "most_in_flight", "turns"]

Shapes = Sequence[tuple[int, ...]]


class _Channel:
    """Tensors to one neighbour and from the other, in order. All of a group's go the same way around."""

    def __init__(self, group: dist.ProcessGroup, to: int, source: int) -> None:
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


def turns(rank: int, ranks: int, parts: int, count: int) -> Iterator[tuple[bool, int, int]]:
    """What a rank does in order: whether forward, which of its stages, which of ``count`` microbatches (a multiple of ``ranks``
    with several stages)."""

    def place(i: int) -> tuple[int, int]:
        group, i = divmod(i, ranks * parts)
        return i // ranks, group * ranks + i % ranks

    total = count * parts
    ahead = ranks - 1 - rank if parts == 1 else 2 * (ranks - 1 - rank) + (parts - 1) * ranks
    for i in range(total + min(ahead, total)):
        if i < total:
            yield True, *place(i)
        if i >= min(ahead, total):
            part, microbatch = place(i - min(ahead, total))
            yield False, parts - 1 - part, microbatch


def most_in_flight(rank: int, ranks: int, parts: int, count: int) -> int:
    """Forward passes through one stage that wait for their backward passes, at most, over all stages of a rank."""
    passes = turns(rank, ranks, parts, min(count, 4 * ranks))
    return max(itertools.accumulate(1 if forward else -1 for forward, _, _ in passes))


def _rows(some: Slots, of: Slots) -> list[int]:
    """The rows of some slots, keys before values, in the tensor ``[2 S, ...]`` of others."""
    places = [of.index(slot) for slot in some]
    return [*places, *(place + len(of) for place in places)]


@dataclass
class _Passed:
    """What a stage keeps of a microbatch between forward and backward pass.

    :param entered: hidden states and slots, whose gradients go back. :param out: where the backward pass begins, and its shapes.
    """

    entered: list[torch.Tensor]
    out: list[Any]
    shapes: list[torch.Size]


class Pipeline:
    """One rank's stages, and their exchange with its neighbours.

    :param parts: the rank's stages in order: what :func:`.stages.cut` left.
    :param groups: of the ranks of this pipeline, in order: one for each direction, so that no message waits for one that goes the
        other way; with several stages per rank two more, for what goes between the last rank and the first.
    :param dtype: of what crosses cuts: that of the model's arithmetic.
    """

    def __init__(
        self, parts: Sequence[torch.nn.Module], groups: Sequence[dist.ProcessGroup], dtype: torch.dtype
    ) -> None:
        self.parts, self.dtype = parts, dtype
        self.stages: list[Stage] = [cast(Any, part).stage for part in parts]
        self.ranks = self.stages[0].ranks
        self.rank = self.stages[0].index
        self.device: torch.device = cast(Any, parts[0]).device
        after, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        down, up, *around = groups
        self.down, self.up = _Channel(down, after, before), _Channel(up, before, after)
        self._around = [_Channel(group, *ends) for group, ends in zip(around, ((after, before), (before, after)))]
        self._passed: dict[tuple[int, int], _Passed] = {}
        # By stage and microbatch: slots that the rank keeps for its next stage, and what that leaves of gradients for them.
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._deposited: dict[tuple[int, int], torch.Tensor] = {}

    def _channel(self, cut: int, down: bool) -> _Channel:
        """The channel through the cut before a stage."""
        if self._around and cut % self.ranks == 0:
            return self._around[0 if down else 1]
        return self.down if down else self.up

    def _enter(self, part: int, microbatch: int, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """What enters a stage, of what is sent and what is here."""
        s = self.stages[part]
        if s.is_first:
            return []
        size, length = batch["input_ids"].shape
        packed = "doc_lens" in batch
        shapes = s.shapes(len(s.received), size, length, packed)
        entered = self._channel(s.index, down=True).receive(shapes, self.dtype, self.device)
        if s.entering != s.received:
            shape = s.shapes(len(s.entering), size, length, packed)[1]
            slots = torch.empty(shape, dtype=self.dtype, device=self.device)
            slots[_rows(s.here, s.entering)] = self._kept.pop((s.index, microbatch))
            if s.received:
                slots[_rows(s.received, s.entering)] = entered.pop()
            entered.append(slots)
        for x in entered:
            x.requires_grad_(torch.is_grad_enabled())
        return entered

    def _forward(self, part: int, microbatch: int, batch: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """A forward pass through one of the stages; the model's result on the last."""
        s = self.stages[part]
        entered = self._enter(part, microbatch, batch)
        of_last = () if s.is_last else ("labels",)
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", *of_last)}
        out = run_stage(self.parts[part], batch["input_ids"], tuple(entered), **rest, **options)
        for slots in entered[1:]:
            slots.untyped_storage().resize_(0)  # the stream has them: only their gradient is of use now
        if s.is_last:
            if torch.is_grad_enabled():
                self._passed[s.index, microbatch] = _Passed(entered, [out.loss], [])
                out = out._replace(loss=out.loss.detach())
            return out
        if torch.is_grad_enabled():  # what was sent need not be kept: its place in the graph is
            edges, shapes = [get_gradient_edge(x) for x in out], [x.shape for x in out]
            self._passed[s.index, microbatch] = _Passed(entered, edges, shapes)
        assert all(x.dtype == self.dtype for x in out)
        sent = [x.detach() for x in out]
        if s.kept:
            self._kept[s.index + s.ranks, microbatch] = sent[1][_rows(s.kept, s.leaving)]
        if s.sent != s.leaving:
            sent[1:] = [sent[1][_rows(s.sent, s.leaving)]] if s.sent else []
        self._channel(s.index + 1, down=True).send(sent)
        return None

    def _backward(self, part: int, microbatch: int) -> None:
        s = self.stages[part]
        passed = self._passed.pop((s.index, microbatch))
        if s.is_last:
            passed.out[0].backward()
        else:
            torch.autograd.backward(passed.out, self._gradients(s, microbatch, passed.shapes))
        grads = [cast(torch.Tensor, x.grad) for x in passed.entered]
        if s.is_first:
            return
        if s.entering != s.received:
            self._deposited[s.index - s.ranks, microbatch] = grads[1][_rows(s.here, s.entering)]
            grads[1:] = [grads[1][_rows(s.received, s.entering)]] if s.received else []
        self._channel(s.index, down=False).send(grads)

    def _gradients(self, s: Stage, microbatch: int, shapes: list[torch.Size]) -> list[torch.Tensor]:
        """The gradients of what a stage gave: those sent back, and for slots that were kept those deposited here."""
        sent = shapes if s.sent == s.leaving else [shapes[0]]
        if s.sent and s.sent != s.leaving:
            sent.append(torch.Size((2 * len(s.sent), *shapes[1][1:])))
        grads = self._channel(s.index + 1, down=False).receive(sent, self.dtype, self.device)
        if s.sent != s.leaving:
            slots = torch.zeros(shapes[1], dtype=self.dtype, device=self.device)
            if s.sent:
                slots[_rows(s.sent, s.leaving)] = grads.pop()
            grads.append(slots)
        if s.kept:
            grads[1][_rows(s.kept, s.leaving)] += self._deposited.pop((s.index, microbatch))
        return grads

    def train(self, microbatches: Sequence[Mapping[str, Any]], **options: Any) -> list[LMOutputWithLoss]:
        """Forward and backward pass of microbatches; the gradients of the stages' parameters are added up.

        :param microbatches: with ``input_ids [B, T]``, ``labels``, and what else the model takes. Every rank is given all; where
            ranks have several stages, as many as there are ranks or a multiple of that.
        :param options: for every forward pass.

        :returns: on the rank of the last stage each one's losses, else nothing.
        """
        count, losses = len(microbatches), []
        assert len(self.parts) == 1 or count % self.ranks == 0
        for forward, part, i in turns(self.rank, self.ranks, len(self.parts), count):
            if not forward:
                self._sync(self.parts[part], last=i == count - 1)
                self._backward(part, i)
            elif (out := self._forward(part, i, microbatches[i], options)) is not None:
                losses.append(out)
        self._finish()
        return losses

    @staticmethod
    def _sync(part: torch.nn.Module, last: bool) -> None:
        """As between microbatches without a pipeline: FSDP adds up copies of the model at the last one alone."""
        if isinstance(part, FSDPModule):
            part.set_is_last_backward(last)
            part.set_requires_all_reduce(last)

    def _finish(self) -> None:
        for channel in (self.down, self.up, *self._around):
            channel.finish()
        assert not (self._passed or self._kept or self._deposited), "nothing is left over"

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any], **options: Any) -> Any:
        """A forward pass; the model's result on the rank of the last stage, else None."""
        out = None
        for part in range(len(self.parts)):
            out = self._forward(part, 0, batch, options)
        self._finish()
        return out

    def share_tied_gradient(self) -> None:
        """Give the two copies of a tied embedding, on the first and on the last stage, the sum of their gradients."""
        first, last = self.stages[0].is_first, self.stages[-1].is_last
        if not (first or last):
            return
        weight = self.parts[0 if first else -1].embeddings.weight  # type: ignore[union-attr]
        grad = cast(torch.Tensor, weight.grad)
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        if last:
            self.up.send([own], to=0)
            (total,) = self.down.receive([own.shape], own.dtype, own.device, source=0)
            own.copy_(total)
        else:
            (other,) = self.up.receive([own.shape], own.dtype, own.device, source=self.ranks - 1)
            own += other
            self.down.send([own], to=self.ranks - 1)
        self._finish()
