"""What a depth mechanism is: how layers read what earlier layers left, beyond the plain residual stream.

A mechanism is a configuration (:class:`DepthMechanism`: its options, what it costs, what it does not work with) and three
kinds of objects that it makes:

* :class:`DepthLayer`, a module of each block, with hooks at two seams: the *residual stream* (what a sublayer receives, how
  its output joins the stream) and the *attention's K/V*;
* :class:`DepthModel`, a module of the whole model, for parameters and steps between blocks;
* :class:`DepthPass`, the state of one forward pass, which hands each block tensors and takes back what the block returns.

Blocks see tensors only, as arguments and results, so that compilation, activation checkpointing, FSDP2 and device maps treat
them like any others. State belongs to a forward pass, never to a module: two passes may be alive at once.

The same classes run in training, in evaluation and, with a KV cache, in the exported model, whose folder carries copies of
these files. So they import torch and the standard library, and ask for anything else through :class:`Host` (the model around
them) and :class:`AttentionHost` (the attention of a block).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from moda.errors import UserError
from moda.registered import Registered
from moda.typed import from_dict, to_dict
from moda_kernels.depth.layout import DepthLayout

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

#: What a sublayer receives: ``[B, T, d_model]``, or for an attention three of them, for its queries, keys and values.
Received = torch.Tensor | tuple[torch.Tensor, ...]
#: Tensors that go into a block and come out of it.
State = tuple[torch.Tensor, ...]
#: What a block was called with besides the stream: document boundaries, masks, the KV cache. Hosts know what is in it.
Context = Mapping[str, Any]


class SlotMemory(Protocol):
    """Depth slots of one forward pass, as the host keeps them."""

    def enter(self, layer: int) -> State:
        """What a block needs to read and write slots."""
        ...

    def leave(self, layer: int, state: State) -> None:
        """Take what the block returned."""
        ...


class SourceMemory(Protocol):
    """Outputs that later layers sum, in one forward pass, as the host keeps them: :class:`moda_kernels.sources.Sources`."""

    def __len__(self) -> int:
        """How many are written."""
        ...

    def write(self, x: torch.Tensor) -> None:
        """The next one, ``[B, T, d_model]``."""
        ...

    def mix(self, weights: torch.Tensor, rows: range | None = None) -> tuple[torch.Tensor, ...]:
        """c sums ``[B, T, d_model]`` of n of them (None: of all), with weights ``[B, T, c, n]`` or ``[c, n]``."""
        ...

    def attend(self, queries: torch.Tensor, eps: float) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """c sums of all of them under a softmax of query . RMSNorm, for queries ``[c, d_model]``, and c LSEs ``[B, T]``."""
        ...


class Host(Protocol):
    """The model around a mechanism."""

    def open_slots(self, layout: DepthLayout, device: torch.device) -> SlotMemory:
        """An empty slot memory for one forward pass."""
        ...

    def open_sources(self, n: int, device: torch.device) -> SourceMemory:
        """Room for n sources of one forward pass. Not within blocks, which may run again in the backward pass."""
        ...


class AttentionHost(Protocol):
    """The attention of a block, step by step. T are the new tokens; a KV cache is the host's affair."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_norm: Any
    k_norm: Any

    def linear(self, x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
        """What each of several linears makes of ``x``; in training by one matrix product."""
        ...

    def gain(self, norm: Any) -> torch.Tensor:
        """The gain of a QK-norm, ``[H * D]`` or ``[D]``."""
        ...

    def project(self, x: Received) -> tuple[torch.Tensor, ...]:
        """Raw queries ``[B, T, Hq * D]``, keys and values ``[B, T, Hk * D]`` of one input, or of one each."""
        ...

    def normalise(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        """``[B, T, H, D]`` of ``[B, T, H * D]`` through a QK-norm, over the width that it has; None for no norm."""
        ...

    def rotate(self, q: torch.Tensor, k: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of ``[B, T, H, D]`` at the tokens' positions."""
        ...

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
        """Softmax attention ``[B, T, Hq, D]`` over the sequence."""
        ...

    def attend_with_slots(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_depth: torch.Tensor | None,
        state: State,
        context: Context,
        top: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Attention under one softmax over the sequence and the slots that this layer reads; and the next state.

        :param top: how many of the slots a token's query head keeps, those of the largest logits (ties stay); None for all.
        :param bias: fp32 or above, added to the logits of the slots read, in their order; it may be longer than they are many.
        """
        ...

    def attend_slots(
        self,
        q: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        state: State,
        context: Context,
        top: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """Attention ``[B, T, H, D]`` over the slots that this layer reads alone, under a softmax of their own; the next state.

        :param own: a key and a value per token ``[B, T, H, D]`` that it sees besides; without them, no slot to read gives zeros.
        """
        ...

    def write_slot(self, k: torch.Tensor, v: torch.Tensor, kind: int, state: State, context: Context) -> State:
        """Write a slot ``[B, T, Hk, D]``; the next state."""
        ...

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """The attention's result ``[B, T, d_model]`` of ``[B, T, Hq, D]``."""
        ...


@torch.no_grad()
def set_start(parameter: torch.Tensor, start: torch.Tensor) -> None:
    """Set a parameter to the same values on every rank, whole or split (``DTensor``, under FSDP)."""
    start = start.to(parameter.device)
    if isinstance(parameter, DTensor):
        start = distribute_tensor(start, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(start)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as a layer computes with it: under tensor parallelism a rank's part, whose gradients the ranks add up."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial() if x.is_replicate() else x for x in parameter.placements])


class DepthLayer(nn.Module):
    """A mechanism's part of one block. As it stands it does what a block without a mechanism does.

    Blocks call the methods below through the module itself, ``depth("attend", ...)``, so that module hooks (device maps,
    offloading) see the calls. Do not read the layer's number in these methods: layers whose attributes are equal share one
    compiled graph.
    """

    def forward(self, method: str, *args: Any) -> Any:
        """Call a method by name."""
        return getattr(self, method)(*args)

    def receive(self, sublayer: str, stream: Any) -> Received:
        """What a sublayer (``attention`` or ``feed_forward``) reads from the stream, before the norm placement."""
        return stream

    def add(self, sublayer: str, stream: Any, out: torch.Tensor) -> Any:
        """How a sublayer's output joins the stream."""
        return stream + out

    def before(self, sublayer: str, stream: Any) -> tuple[Received, State]:
        """:meth:`receive`, and tensors for :meth:`after`: what a mechanism computes once for both."""
        return self.receive(sublayer, stream), ()

    def after(self, sublayer: str, stream: Any, out: torch.Tensor, kept: State) -> Any:
        """:meth:`add`, with what :meth:`before` gave for the same sublayer."""
        return self.add(sublayer, stream, out)

    def attend(
        self, attention: AttentionHost, x: Received, state: State, context: Context
    ) -> tuple[torch.Tensor, State]:
        """The attention's output ``[B, T, d_model]`` for its input, and the next state."""
        q, k, v = attention.project(x)
        q, k = attention.normalise(q, attention.q_norm), attention.normalise(k, attention.k_norm)
        q, k = attention.rotate(q, k, context)
        out = attention.attend(q, k, v.unflatten(-1, (-1, attention.head_dim)), context)
        return attention.output(out), state

    def feed_forward(
        self,
        ffn: Callable[[torch.Tensor], torch.Tensor],
        attention: AttentionHost,
        x: torch.Tensor,
        state: State,
        context: Context,
    ) -> tuple[torch.Tensor, State]:
        """The FFN's output ``[B, T, d_model]`` for its input, and the next state."""
        return ffn(x), state

    def split_by_heads(self) -> list[nn.Module]:
        """Linears that give keys or values, whose outputs tensor parallelism splits by heads.

        There a layer sees its rank's heads only, and reads its other parameters through :func:`local`.
        """
        return []

    def reset_parameters(self) -> None:
        """Set the parameters that are not linears' (those are initialised like every other linear of the model).

        They may be split already (under FSDP): fill them in place (``nn.init``), or use :func:`set_start`.
        """


class DepthPass:
    """One forward pass. As it stands there is no state."""

    def enter(self, layer: int, stream: Any) -> tuple[Any, State]:
        """The stream and the state that a block is called with."""
        return stream, ()

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        """The stream after a block, from what it returned."""
        return stream

    def finish(self, stream: Any) -> torch.Tensor:
        """What the final norm receives, ``[B, T, d_model]``."""
        return stream


class DepthModel(nn.Module):
    """A mechanism's part of the whole model. As it stands it has no parameters."""

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        """The first stream for embeddings ``[B, T, d_model]``, and the pass."""
        return h, DepthPass()

    def reset_parameters(self) -> None:
        """Set the parameters that are not linears'."""


#: What a model can be asked for, and why a mechanism refuses it unless it says otherwise.
_REFUSED: Mapping[str, str] = {
    "tensor_parallel": "it is not split by heads yet",
    "context_parallel": "it is not split by tokens yet",
    "pipeline_parallel": "its state would have to cross stages",
}


#: Parameters by mechanism and model: sweeps ask again and again.
_COUNTED: dict[tuple[type, str], int] = {}


def refused_but(*features: str) -> Mapping[str, str]:
    """What is refused to a mechanism that works with some of the features that are refused unless a mechanism says otherwise."""
    return {feature: reason for feature, reason in _REFUSED.items() if feature not in features}


class DepthMechanism(Registered):
    """A mechanism's options and what follows from them: a dataclass, named by ``model.depth.mechanism``.

    A mechanism is a file with a class like this one and a line in ``moda.depth``. Methods take the model's section
    (:class:`moda.config.model.ModelConfig`).
    """

    family = "depth mechanism"
    #: The paper.
    source: ClassVar[str]
    #: Features that the mechanism does not work with, each with the reason. See :meth:`refuses` for their names. The parallel
    #: ones are refused unless a mechanism says that it works with them.
    refused: ClassVar[Mapping[str, str]] = _REFUSED
    #: Parameters (globs of names) that weight decay must leave alone.
    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_plain(cls, value: Any, key: str) -> DepthMechanism:
        """The mechanism of a section ``{mechanism: NAME, option: value, ...}``.

        :raises UserError: for an unknown mechanism, or an option that it does not have.
        """
        if isinstance(value, DepthMechanism):
            return value
        if not isinstance(value, Mapping):
            close = difflib.get_close_matches(str(value), cls.known, n=1, cutoff=0.5)
            hint = f"for example {{mechanism: {close[0] if close else next(iter(cls.known))}}}"
            raise UserError(key, "a section that names a mechanism, or null", "null" if value is None else value, hint)
        options = dict(value)
        if "mechanism" not in options:
            raise UserError(f"{key}.mechanism", f"one of {', '.join(cls.known)}", hint="it has no default")
        member = cls.member(options.pop("mechanism"), f"{key}.mechanism")
        own = {f.name for f in dataclasses.fields(member)}  # type: ignore[arg-type]
        for name in options:
            owners = [m.name for m in cls.known.values() if name in {f.name for f in dataclasses.fields(m)}]
            if name not in own and owners:
                hint = f"it is an option of {', '.join(owners)}; {member.name} has {', '.join(sorted(own)) or 'none'}"
                raise UserError(f"{key}.{name}", f"an option of {member.name}", hint=hint)
        return from_dict(member, options, key)

    def to_plain(self) -> Any:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"mechanism": self.name, **{f.name: to_dict(getattr(self, f.name)) for f in fields}}

    def check(self, model: ModelConfig) -> None:
        """Refuse a model that the mechanism cannot be part of.

        :raises UserError: naming the key.
        """

    def refuses(self, feature: str) -> str | None:
        """Why the mechanism does not work with a feature, or None if it does.

        :param feature: ``tensor_parallel``, ``context_parallel``, ``pipeline_parallel``, ``document_masking`` or
            ``shared_prefix`` (several continuations of one text in a row, under a mask).
        """
        return self.refused.get(feature)

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        """The module of block ``index``, on the current default device."""
        return DepthLayer()

    def build_model(self, model: ModelConfig) -> DepthModel:
        """The module of the whole model, on the current default device."""
        return DepthModel()

    def layout(self, n_layers: int) -> DepthLayout | None:
        """The slots that the layers of a model write and read; None for a mechanism without slots."""
        return None

    def num_params(self, model: ModelConfig) -> int:
        """Parameters that the mechanism adds, counted from its modules."""
        key = type(self), f"{self} {model}"
        if key not in _COUNTED:
            with torch.device("meta"):
                modules = [
                    self.build_model(model),
                    *(self.build_layer(model, index) for index in range(model.n_layers)),
                ]
            _COUNTED[key] = sum(p.numel() for module in modules for p in module.parameters())
        return _COUNTED[key]

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        """Forward FLOPs per token besides the matrix products with its own parameters."""
        return 0

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        """Bytes that a forward pass of ``tokens`` tokens keeps between blocks for the backward one, by purpose, besides slots."""
        return {}

    def block_memory(self, model: ModelConfig, tokens: float, element_size: int) -> float:
        """Bytes that all blocks together keep of their own, besides what attention, FFN and norms do."""
        return 0.0

    def backward_memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        """Bytes that the backward pass needs further, by purpose, besides the gradients of slots."""
        return {}

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        """Lines of a dry run, as name and value."""
        return []

    def draw(self, axes: Any, model: ModelConfig) -> None:
        """Draw on matplotlib axes what layers read of earlier layers (rows: readers, columns: sources)."""
        axes.text(0.5, 0.5, f"{self.name} has no drawing", ha="center", va="center")
        axes.axis("off")
