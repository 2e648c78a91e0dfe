"""mHC, manifold-constrained hyper-connections (arXiv 2512.24880): residual streams that mix by doubly stochastic matrices.

With the n streams x ``[n, d]`` of a token, x' = RMSNorm(vec(x)) over all n d numbers, and a sublayer F (the paper's Eq. 3, 7, 8):

    x_next = H_res x + H_post^T F(H_pre x)

    H_pre  = sigmoid(a_pre x' phi_pre + b_pre)            H_post = 2 sigmoid(a_post x' phi_post + b_post)
    H_res  = Sinkhorn(a_res mat(x' phi_res) + b_res)      exp, then columns and rows scaled to sum to 1 in turn (Eq. 9)

The gates a begin at 0.01. Where b and phi begin the paper does not print; here phi is zero, b_pre gives 1 / n, b_post gives 1,
and H_res is within 1e-3 of the identity, so that the model begins as one with a plain residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from moda.ranges import Count
from moda_kernels.sinkhorn import sinkhorn

from .hyper_connections import (
    EPS,
    Connection,
    StreamsLayer,
    StreamsModel,
    project,
    streams_block_memory,
    streams_memory,
    weighted_sum,
)  # fmt: skip
from .mechanism import DepthLayer, DepthMechanism, DepthModel, State, set_start

if TYPE_CHECKING:
    from moda.config.model import ModelConfig


class _Connection(Connection):
    """The connection of one sublayer: pre, post and res side by side in ``phi`` and ``b``."""

    def __init__(self, n: int, d_model: int, iterations: int) -> None:
        super().__init__()
        self.n, self.iterations = n, iterations
        self.phi = nn.Parameter(torch.empty(n * d_model, 2 * n + n * n))
        self.b = nn.Parameter(torch.empty(2 * n + n * n))
        self.gates = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def matrices(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """H_pre and H_post ``[B, T, n]``, H_res ``[B, T, n, n]`` for streams ``[n, B, T, d]``, in fp32 or above."""
        wide = torch.promote_types(streams.dtype, torch.float32)
        scale = (streams.to(wide).square().mean((0, -1))[..., None] + EPS).rsqrt()
        given = scale * project(streams, self.phi.unflatten(0, (self.n, -1))).to(wide).sum(0)
        sizes = (self.n, self.n, self.n * self.n)
        parts = zip(self.gates.to(wide), given.split(sizes, -1), self.b.to(wide).split(sizes, -1))
        pre, post, res = (gate * x + b for gate, x, b in parts)
        return pre.sigmoid(), 2 * post.sigmoid(), sinkhorn(res.unflatten(-1, (self.n, self.n)), self.iterations)

    def read(self, streams: torch.Tensor) -> tuple[torch.Tensor, State]:
        pre, post, res = self.matrices(streams)
        return weighted_sum(pre.movedim(-1, 0), streams).to(streams.dtype), (post, res)

    def write(self, streams: torch.Tensor, out: torch.Tensor, matrices: State) -> torch.Tensor:
        post, res = matrices
        rows = res.movedim((-2, -1), (0, 1))
        mixed = [weighted_sum(row, streams) + post[..., j, None] * out for j, row in enumerate(rows)]
        return torch.stack([x.to(streams.dtype) for x in mixed])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        n = self.n
        start = torch.zeros(2 * n + n * n)
        start[:n] = -math.log(n - 1) if n > 1 else 8.0  # sigmoid: 1 / n
        start[2 * n :] = -8.0 * (1 - torch.eye(n)).flatten()
        set_start(self.b, start)
        nn.init.zeros_(self.phi)
        nn.init.constant_(self.gates, 0.01)


@dataclass(frozen=True)
class MHC(DepthMechanism):
    """Several residual streams that mix by doubly stochastic matrices.

    :param streams: n, the expansion rate.
    :param iterations: of Sinkhorn and Knopp's scaling.
    """

    name = "mhc"
    source = "arXiv 2512.24880"
    no_weight_decay = ("*.depth.connections.*.b", "*.depth.connections.*.gates")

    streams: Count = 4
    iterations: Count = 20

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return StreamsLayer(*(_Connection(self.streams, model.d_model, self.iterations) for _ in range(2)))

    def build_model(self, model: ModelConfig) -> DepthModel:
        return StreamsModel(self.streams)

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        n = self.streams
        return 2 * model.n_layers * (2 * n * (n + 2) * model.d_model + 4 * self.iterations * n * n)

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return streams_memory(model, self.streams, tokens, element_size)

    def block_memory(self, model: ModelConfig, tokens: float, element_size: int) -> float:
        return streams_block_memory(model, self.streams, 2.45, tokens, element_size)

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        return [("residual streams", f"{self.streams}, doubly stochastic, {self.iterations} iterations")]
