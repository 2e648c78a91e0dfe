"""Attention residuals (arXiv 2603.15031): each sublayer attends over the outputs of all earlier ones instead of their sum.

With v_0 the embedding, v_i the output of sublayer i, and a query w and a norm of its own for each sublayer:

    h = sum over i of p_i v_i        p = softmax over i of w . RMSNorm(v_i)

and the final norm receives such a sum as well. The block form keeps sums: sublayers are divided into blocks, a finished block is
the sum of its outputs, and a sublayer attends over the embedding, the finished blocks and the sum of its own block so far. At
the start w is zero, which is the mean.

Before a block of the model its two sublayers read what is finished, in one pass over it; within the block they add the source
that still grows, by log-sum-exp. So blocks receive the same few tensors in every layer, and share compiled graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from moda.errors import UserError
from moda.ranges import Count

from .mechanism import DepthLayer, DepthMechanism, DepthModel, DepthPass, Host, SourceMemory, State

if TYPE_CHECKING:
    from moda.config.model import ModelConfig


def read(readers: Sequence[nn.Module], sources: SourceMemory) -> tuple[tuple[torch.Tensor, ...], ...]:
    """What readers get of all sources, in one pass over them: sums ``[B, T, d]``, LSEs ``[B, T]``; and their queries."""
    queries = tuple(reader() for reader in readers)
    return *sources.attend(torch.stack(queries), readers[0].eps), queries  # type: ignore[arg-type]


def join(own: torch.Tensor, query: torch.Tensor, eps: float, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """What a reader gets of one more source, beside the sum ``out [B, T, d]`` and the LSE ``[B, T]`` of the others."""
    x = own.to(lse.dtype)
    logit = (x @ query.to(x.dtype)) * torch.rsqrt(x.square().mean(-1) + eps)
    weight = torch.sigmoid(logit - lse)[..., None]
    return (weight * x + (1 - weight) * out).to(own.dtype)


class Reader(nn.Module):
    """The query and the norm of one sublayer."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.query = nn.Parameter(torch.empty(d_model))
        self.gain = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def forward(self) -> torch.Tensor:
        """The query with the norm's gain, in fp32 or above."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.to(wide) * self.gain.to(wide)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.query)
        nn.init.ones_(self.gain)


class ReadersModel(DepthModel):
    """The readers of all sublayers."""

    def __init__(self, n: int, model: ModelConfig) -> None:
        super().__init__()
        self.readers = nn.ModuleList(Reader(model.d_model, model.norm_eps) for _ in range(n))

    def reset_parameters(self) -> None:
        for reader in self.readers:
            reader.reset_parameters()  # type: ignore[operator]


class _Layer(DepthLayer):
    """The stream is, of each sublayer's reader, the sum over the finished blocks, the LSE and the query; and the newest source.

    :param begins: by sublayer, whether its output begins a block.
    """

    def __init__(self, eps: float, begins: dict[str, bool]) -> None:
        super().__init__()
        self.eps, self.begins = eps, begins

    def receive(self, sublayer: str, stream: Any) -> torch.Tensor:
        out, lse, query = stream[:3]
        if sublayer == "attention" and self.begins[sublayer]:  # the newest source is among the finished ones
            return out
        return join(stream[-1], query, self.eps, out, lse)

    def add(self, sublayer: str, stream: Any, out: torch.Tensor) -> Any:
        newest = stream[-1]
        if sublayer == "attention":
            return (*stream[3:-1], out if self.begins[sublayer] else newest + out)
        return (newest, out) if self.begins[sublayer] else (newest + out,)


class _Pass(DepthPass):
    """Sources are the embedding and finished blocks. The newest one, which still grows, is joined within blocks of the model."""

    def __init__(self, readers: nn.ModuleList, length: int, sources: SourceMemory, h: torch.Tensor) -> None:
        self.readers, self.length, self.sources, self.newest = readers, length, sources, h

    def enter(self, layer: int, stream: Any) -> tuple[Any, State]:
        if 2 * layer % self.length == 0:
            self.sources.write(self.newest)
        attention, feed_forward = zip(*read([*self.readers[2 * layer : 2 * layer + 2]], self.sources))
        return (*attention, *feed_forward, self.newest), ()

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        *finished, self.newest = stream
        for source in finished:
            self.sources.write(source)
        return stream

    def finish(self, stream: Any) -> torch.Tensor:
        self.sources.write(self.newest)
        return read([self.readers[-1]], self.sources)[0][0]


class _Model(ReadersModel):
    def __init__(self, length: int, model: ModelConfig) -> None:
        super().__init__(2 * model.n_layers + 1, model)
        self.length = length

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        sources = host.open_sources((len(self.readers) - 1) // self.length + 1, h.device)
        return h, _Pass(self.readers, self.length, sources, h)


class _Probe:
    """Stands for a stream: a placement that hands it to ``add`` and returns what comes back leaves the stream alone."""


def check_stream_left_alone(model: ModelConfig, mechanism: str) -> None:
    """Refuse a norm placement that normalises the stream, which here is no tensor.

    :raises UserError: naming the placement.
    """
    after: Any = _Probe()
    try:
        left_alone = model.norm_placement.combine(_Probe(), None, [lambda x: None] * 2, lambda x, out: after) is after
    except TypeError:
        left_alone = False
    if not left_alone:
        expected = f"one that leaves the stream to {mechanism} (N of a sublayer's output alone)"
        raise UserError("model.norm_placement", expected, model.norm_placement.name, "for example pre")


def sources_memory(model: ModelConfig, sources: int, joined: int, tokens: float, element_size: int) -> dict[str, float]:
    """Bytes of a stream of sources, and of so many sums of them and sources that blocks join, each kept for the backward pass."""
    size = float(tokens * model.d_model * element_size)
    return {"sources": sources * size, "sums of sources": joined * size}


def gradients_memory(model: ModelConfig, sources: int, tokens: float, element_size: int) -> dict[str, float]:
    """Bytes of the gradients of a stream of sources."""
    return {"gradients of sources": float(sources * tokens * model.d_model * element_size)}


def draw_sources(axes: Any, counts: list[int], title: str) -> None:
    """Draw which sources (columns) each sublayer (row) attends over, of its number of sources."""
    cells = [(source, row) for row, n in enumerate(counts) for source in range(n)]
    axes.scatter(*zip(*cells), marker="s", s=12, color="#4c78a8", label="source")
    axes.set(xlabel="source (0: embeddings)", ylabel="sublayer", title=title)
    axes.set(xlim=(-1, max(counts)), ylim=(len(counts), -1))
    axes.legend(loc="upper right", frameon=False)


@dataclass(frozen=True)
class AttentionResiduals(DepthMechanism):
    """Attention over the outputs of earlier sublayers.

    :param blocks: how many blocks the sublayers are divided into; null for the full form, a block per sublayer.
    """

    name = "attention_residuals"
    source = "arXiv 2603.15031"
    no_weight_decay = ("depth.readers.*",)

    blocks: Count | None = None

    def check(self, model: ModelConfig) -> None:
        if self.blocks is not None and 2 * model.n_layers % self.blocks:
            raise UserError("model.depth.blocks", f"a divisor of the {2 * model.n_layers} sublayers", self.blocks)
        check_stream_left_alone(model, self.name)

    def _length(self, model: ModelConfig) -> int:
        """Sublayers in a block."""
        return 1 if self.blocks is None else 2 * model.n_layers // self.blocks

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        length = self._length(model)
        begins = {name: (2 * index + i) % length == 0 for i, name in enumerate(("attention", "feed_forward"))}
        return _Layer(model.norm_eps, begins)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model(self._length(model), model)

    def _sources(self, model: ModelConfig) -> list[int]:
        """How many sources each sublayer, and the end, attends over."""
        length = self._length(model)
        return [1 + -(-i // length) for i in range(2 * model.n_layers + 1)]

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 6 * model.d_model * sum(self._sources(model))  # the query, the norm's sum of squares, the weighted sum

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        length, n = self._length(model), model.n_layers
        # Of each FFN's reader, and of an attention's that joins a source; the end's. A source joined takes the result's place.
        joined = n + 1 + sum(2 * layer % length > 0 for layer in range(n))
        return sources_memory(model, max(self._sources(model)), joined, tokens, element_size)

    def backward_memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return gradients_memory(model, max(self._sources(model)), tokens, element_size)

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        form = "full" if self.blocks is None else f"{self.blocks} blocks"
        return [("attention residuals", f"{form}, up to {max(self._sources(model))} sources")]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        draw_sources(axes, self._sources(model), "what sublayers, and the end, attend over")
