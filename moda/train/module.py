"""The train module of a single process: no sharding, arithmetic on copies in half precision, microbatches as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Generator, Iterator
from typing import Any

import torch
import torch.nn as nn
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.nn.rope import RotaryEmbeddingBase
from olmo_core.nn.transformer import Transformer
from olmo_core.train.train_module import TransformerTrainModule
from olmo_core.utils import move_to_device

log = logging.getLogger(__name__)

#: Microbatches that run as they are before one is captured: they compile and choose tiles.
WARMUP = 3


class HalfCopies:
    """Copies of a model's fp32 parameters that take their places while it computes, as under FSDP2's mixed precision.

    A copy's gradient is added to its parameter's, in fp32, as soon as the backward pass has it.

    :param dtype: of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._own: list[torch.Tensor] = list(model.parameters())
        self._copies: list[torch.Tensor] = [
            nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in self._own
        ]
        copies = dict(zip(map(id, self._own), self._copies))
        modules = list(model.modules())
        places = [
            (m, name, p) for m in modules for name, p in m.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._places = [(module, name, own, copies[id(own)]) for module, name, own in places]
        for own, copy in zip(self._own, self._copies):
            if own.requires_grad:
                copy.register_post_accumulate_grad_hook(functools.partial(_hand_over, own))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the parameters' present values."""
        torch._foreach_copy_(self._copies, self._own)

    def drop_gradients(self) -> None:
        """Forget gradients of a backward pass that was broken off."""
        for copy in self._copies:
            copy.grad = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The copies are the model's parameters."""
        for module, name, _, copy in self._places:
            setattr(module, name, copy)
        try:
            yield
        finally:
            for module, name, own, _ in self._places:
                setattr(module, name, own)


@torch.no_grad()
def _hand_over(own: torch.Tensor, copy: torch.Tensor) -> None:
    assert copy.grad is not None
    if own.grad is None:
        if copy.is_cuda and torch.cuda.is_current_stream_capturing():  # each replay would store, and not add
            raise RuntimeError("a parameter had no gradient before")
        own.grad = copy.grad.to(own.dtype)
    else:
        own.grad.add_(copy.grad)
    copy.grad = None


class OneProcessTrainModule(TransformerTrainModule):
    """OLMo-core's train module without a process group.

    What it computes is what FSDP2 computes on one rank, bit for bit, but for attention residuals and delta residuals, whose LSEs
    and queries FSDP2 rounds where they enter a block. Small models wait for the host there: for wrappers, and for one launch
    after another.

    :param half: dtype of the model's arithmetic; None for that of its parameters.
    :param cuda_graph: run forward and backward of a microbatch as one CUDA graph, once :data:`WARMUP` have run without. None: if
        it can be captured.
    """

    def __init__(
        self, model: Transformer, *, half: torch.dtype | None = None, cuda_graph: bool | None = False, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        self._half = half
        self._halves: HalfCopies | None = None  # made from weights that are there
        self._graphing, self._must_capture = cuda_graph is not False, cuda_graph is True
        self._warmed = 0
        self._trained: list[torch.Tensor] = []  # get gradients; the optimizer leaves other parameters alone
        self._copies: torch.cuda.Stream | None = None
        self._stream = torch.cuda.Stream(self.device) if self._graphing else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._outputs: tuple[torch.Tensor | None, ...] = ()
        self._held: list[tuple[torch.Tensor, ...]] = []

    def _refresh(self) -> None:
        if self._half is not None and self._halves is None:
            self._halves = HalfCopies(self.model, self._half)
        elif self._halves is not None:
            self._halves.refresh()

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._halves is None else self._halves.in_place()

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        self._refresh()
        super().train_batch(self._on_device(batch), dry_run)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the model's device. Its copy does not wait for what the GPU still computes, nor the host with it."""
        if self.device.type != "cuda":
            return batch
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        computing = torch.cuda.current_stream()
        with torch.cuda.stream(self._copies):
            moved = move_to_device(batch, self.device)
        computing.wait_stream(self._copies)
        for value in moved.values():
            if isinstance(value, torch.Tensor):
                value.record_stream(computing)
        return moved

    @contextlib.contextmanager
    def _eval_batch_context(self) -> Generator[None, None, None]:
        self._refresh()
        with super()._eval_batch_context(), self._computing():
            yield

    @contextlib.contextmanager
    def _train_microbatch_context(self, micro_batch_idx: int, num_micro_batches: int) -> Generator[None, None, None]:
        with contextlib.ExitStack() as held:
            held.enter_context(super()._train_microbatch_context(micro_batch_idx, num_micro_batches))
            if self._graph is None:
                held.enter_context(self._computing())
            yield

    def zero_grads(self) -> None:
        if self._graph is None:
            super().zero_grads()
        else:  # the graph adds to these tensors
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])

    def model_forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        div = kwargs.get("loss_div_factor")
        if not self._graphing or div is None or labels is None:  # an evaluation
            return super().model_forward(input_ids, labels=labels, **kwargs)
        del kwargs["loss_div_factor"]
        inputs = (input_ids, labels, div)
        if self._graph is not None and any(x.shape != y.shape for x, y in zip(inputs, self._inputs)):
            raise RuntimeError(
                f"a microbatch {tuple(input_ids.shape)} where {tuple(self._inputs[0].shape)} was captured"
            )
        assert self._stream is not None
        if self._warmed < WARMUP:
            self._warmed += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                outputs = self._forward_and_backward(inputs, kwargs)
            torch.cuda.current_stream().wait_stream(self._stream)
            assert self.optim is not None
            own = [p for group in self.optim.param_groups for p in group["params"]]
            self._trained = [p for p in own if p.grad is not None]
        else:
            if self._graph is None and not self._capture(inputs, kwargs):
                return super().model_forward(input_ids, labels=labels, loss_div_factor=div, **kwargs)
            assert self._graph is not None
            for static, given in zip(self._inputs, inputs):
                static.copy_(given, non_blocking=True)
            self._graph.replay()
            outputs = self._outputs
        loss, ce_loss, z_loss = outputs
        assert loss is not None and ce_loss is not None
        # Its gradients are there already: the backward pass that the caller runs is that of a number by itself.
        return LMOutputWithLoss(logits=None, loss=loss.detach().requires_grad_(), ce_loss=ce_loss, z_loss=z_loss)

    def _forward_and_backward(
        self, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor | None, ...]:
        input_ids, labels, div = inputs
        _, loss, ce_loss, z_loss = super().model_forward(input_ids, labels=labels, loss_div_factor=div, **kwargs)
        loss.backward()
        return loss.detach(), ce_loss.detach(), None if z_loss is None else z_loss.detach()

    def _capture(self, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> bool:
        """Capture a microbatch like this one; whether it could be."""
        for p in self._trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        static = tuple(x.to(self.device, copy=True) for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._forward_and_backward(static, kwargs)
        except RuntimeError as e:  # something in it waits for the GPU
            if self._must_capture:
                raise
            log.warning("training goes on without a CUDA graph, which could not be captured: %s", str(e).split("\n")[0])
            self._graphing = False
            if self._halves is not None:
                self._halves.drop_gradients()
            return False
        self._graph, self._inputs, self._outputs = graph, static, outputs
        # The graph reads these by address, and something longer may have others put in their place.
        self._held = [tuple(m._cache.values()) for m in self.model.modules() if isinstance(m, RotaryEmbeddingBase)]
        log.info("captured a microbatch as a CUDA graph")
        return True
