"""Hyper-connections (arXiv 2409.19606): n residual streams, mixed before and after each sublayer.

With the streams H ``[n, d]`` of a token, a sublayer T, and the matrices of its connection (the paper's Eq. 2 to 5)

    h = A_m^T H        H' = A_r^T H + B^T T(h)

A_m ``[n, 1]`` says what the sublayer reads, A_r ``[n, n]`` how the streams mix, B ``[1, n]`` where its output goes. Static, they
are parameters; dynamic (Eq. 10 to 13), each has a part that the streams give:

    A = s_a tanh(norm(H) W_a) + A        B = s_b tanh(norm(H) W_b)^T + B

All streams begin as the embedding, and their sum goes to the final norm. At the start W is zero, A_r the identity, B ones and
A_m reads stream k mod n in sublayer k, which is a plain residual stream. The paper also scales the initial weights of output
projections by the square root of n; the model's own initialisation stays here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from moda.ranges import Count

from .mechanism import DepthLayer, DepthMechanism, DepthModel, DepthPass, Host, State, set_start

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

EPS = 1e-6


def project(streams: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``streams @ weight`` for streams ``[n, B, T, d]`` and ``[d, few]`` or ``[n, d, few]``, in the streams' dtype.

    Columns are filled up to a multiple of eight, which is how GPUs multiply fast. An RMS norm without a gain is a factor per
    vector, and can be applied to what comes out, so that the streams are read as they are.
    """
    padded = F.pad(weight.to(streams.dtype), (0, -weight.shape[-1] % 8))
    given = torch.matmul(streams.flatten(1, 2), padded).unflatten(1, streams.shape[1:3])
    return given[..., : weight.shape[-1]]


def weighted_sum(weights: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    """Sum over i of ``weights[i, ..., None] * streams[i]``, in the weights' dtype.

    Term by term, of which the compiler makes one loop. A product of many small matrices would be a kernel of its own, with a copy
    of the streams in its dtype.
    """
    total = weights[0, ..., None] * streams[0]
    for weight, stream in zip(weights[1:], streams[1:]):
        total = total + weight[..., None] * stream
    return total


class Connection(nn.Module):
    """A module with methods ``read`` and ``write``, called by name so that module hooks (offloading) see the calls."""

    def read(self, streams: torch.Tensor) -> tuple[torch.Tensor, State]:
        """What the sublayer receives of streams ``[n, B, T, d]``, ``[B, T, d]``, and the matrices of its ``write``."""
        raise NotImplementedError

    def write(self, streams: torch.Tensor, out: torch.Tensor, matrices: State) -> torch.Tensor:
        """The streams after the sublayer gave ``out`` ``[B, T, d]``."""
        raise NotImplementedError

    def forward(self, method: str, *args: Any) -> Any:
        """Call a method by name."""
        return getattr(self, method)(*args)


class _Connection(Connection):
    """The connection of one sublayer: ``alpha`` is A_m beside A_r."""

    def __init__(self, n: int, d_model: int, dynamic: bool, first: int) -> None:
        super().__init__()
        self.first = first
        self.alpha = nn.Parameter(torch.empty(n, 1 + n))
        self.beta = nn.Parameter(torch.empty(n))
        self.weight = nn.Parameter(torch.empty(d_model, n + 2)) if dynamic else None
        self.scales = nn.Parameter(torch.empty(2)) if dynamic else None
        self.reset_parameters()

    def matrices(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[n, B, T, 1 + n]`` and B ``[n, B, T]`` for streams ``[n, B, T, d]``, in fp32 or above."""
        wide = torch.promote_types(streams.dtype, torch.float32)
        alpha, beta = self.alpha.to(wide)[:, None, None], self.beta.to(wide)[:, None, None]
        if self.weight is not None and self.scales is not None:
            scale = (streams.to(wide).square().mean(-1, keepdim=True) + EPS).rsqrt()
            given = torch.tanh(scale * project(streams, self.weight))
            s_alpha, s_beta = self.scales.to(wide)
            alpha, beta = alpha + s_alpha * given[..., :-1], beta + s_beta * given[..., -1]
        return alpha, beta

    def read(self, streams: torch.Tensor) -> tuple[torch.Tensor, State]:
        matrices = alpha, _ = self.matrices(streams)
        return weighted_sum(alpha[..., 0], streams).to(streams.dtype), matrices

    def write(self, streams: torch.Tensor, out: torch.Tensor, matrices: State) -> torch.Tensor:
        alpha, beta = matrices
        mixed = [weighted_sum(alpha[..., 1 + j], streams) + beta[j, ..., None] * out for j in range(len(beta))]
        return torch.stack([x.to(streams.dtype) for x in mixed])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        n = len(self.beta)
        start = torch.eye(n, 1 + n).roll(1, dims=1)
        start[self.first % n, 0] = 1
        set_start(self.alpha, start)
        nn.init.ones_(self.beta)
        if self.weight is not None and self.scales is not None:
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.scales, 0.01)


class StreamsLayer(DepthLayer):
    """A block's two connections."""

    def __init__(self, attention: Connection, feed_forward: Connection) -> None:
        super().__init__()
        self.connections = nn.ModuleDict({"attention": attention, "feed_forward": feed_forward})

    def before(self, sublayer: str, stream: Any) -> tuple[torch.Tensor, State]:
        return self.connections[sublayer]("read", stream)

    def after(self, sublayer: str, stream: Any, out: torch.Tensor, kept: State) -> Any:
        return self.connections[sublayer]("write", stream, out, kept)


class _Pass(DepthPass):
    def finish(self, stream: Any) -> torch.Tensor:
        return stream.sum(0)


class StreamsModel(DepthModel):
    """Copies the embedding into n streams ``[n, B, T, d]`` and ends with their sum."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        return h.expand(self.n, *h.shape).contiguous(), _Pass()


def streams_memory(model: ModelConfig, streams: int, tokens: float, element_size: int) -> dict[str, float]:
    """Bytes of the streams between blocks, besides the plain one."""
    return {"residual streams": float(model.n_layers * (streams - 1) * tokens * model.d_model * element_size)}


def streams_block_memory(model: ModelConfig, streams: int, kept: float, tokens: float, element_size: int) -> float:
    """What blocks keep of the streams besides their inputs.

    :param kept: tensors of the streams' width that the compiler's partitioner saves per block, counted.
    """
    width = kept * streams - (streams - 1)
    return width * model.n_layers * tokens * model.d_model * element_size


@dataclass(frozen=True)
class HyperConnections(DepthMechanism):
    """Several residual streams with learned connections.

    :param streams: n, the expansion rate.
    :param dynamic: whether the connections also depend on the streams.
    """

    name = "hyper_connections"
    source = "arXiv 2409.19606"
    no_weight_decay = ("*.depth.connections.*.alpha", "*.depth.connections.*.beta", "*.depth.connections.*.scales")

    streams: Count = 4
    dynamic: bool = True

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return StreamsLayer(*(_Connection(self.streams, model.d_model, self.dynamic, 2 * index + i) for i in (0, 1)))

    def build_model(self, model: ModelConfig) -> DepthModel:
        return StreamsModel(self.streams)

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        n = self.streams
        mixing = 2 * n * (n + 2) * model.d_model
        projection = 2 * (n - 1) * (n + 2) * model.d_model if self.dynamic else 0  # of all streams but the counted one
        return 2 * model.n_layers * (mixing + projection)

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return streams_memory(model, self.streams, tokens, element_size)

    def block_memory(self, model: ModelConfig, tokens: float, element_size: int) -> float:
        return streams_block_memory(model, self.streams, 2.15 if self.dynamic else 2.05, tokens, element_size)

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        kind = "dynamic" if self.dynamic else "static"
        return [("residual streams", f"{self.streams}, {kind} connections")]
