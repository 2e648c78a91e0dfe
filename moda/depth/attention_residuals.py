"""Attention residuals (arXiv 2603.15031): each sublayer attends over the outputs of all earlier ones instead of their sum.

With v_0 the embedding, v_i the output of sublayer i, and a query w and a norm of its own for each sublayer:

    h = sum over i of p_i v_i        p = softmax over i of w . RMSNorm(v_i)

and the final norm receives such a sum as well. The block form keeps sums: sublayers are divided into blocks, a finished block is
the sum of its outputs, and a sublayer attends over the embedding, the finished blocks and the sum of its own block so far. At
the start w is zero, which is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from moda.errors import UserError
from moda.ranges import Count

from .mechanism import DepthLayer, DepthMechanism, DepthModel, DepthPass, Host

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

#: The residual stream: what is attended over, each ``[B, T, d_model]``.
Sources = tuple[torch.Tensor, ...]


class _Reader(nn.Module):
    """The query and the norm of one sublayer."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.query = nn.Parameter(torch.empty(d_model))
        self.gain = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def weights(self, sources: Sources) -> torch.Tensor:
        """The weight of each source, ``[n, B, T]``, in fp32 or above."""
        wide = torch.promote_types(sources[0].dtype, torch.float32)
        query = self.query.to(wide) * self.gain.to(wide)
        logits = []
        for source in sources:  # the query meets the norm's scale afterwards: no normalised copies are kept
            x = source.to(wide)
            logits.append((x @ query) * torch.rsqrt(x.square().mean(-1) + self.eps))
        return torch.stack(logits).softmax(0)

    def forward(self, sources: Sources) -> torch.Tensor:
        weights = self.weights(sources).to(sources[0].dtype)
        total = weights[0, ..., None] * sources[0]
        for weight, source in zip(weights[1:], sources[1:]):
            total = total + weight[..., None] * source
        return total

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.query)
        nn.init.ones_(self.gain)


class _Layer(DepthLayer):
    """:param begins: by sublayer, whether its output begins a block."""

    def __init__(self, d_model: int, eps: float, begins: dict[str, bool]) -> None:
        super().__init__()
        self.begins = begins
        self.readers = nn.ModuleDict({sublayer: _Reader(d_model, eps) for sublayer in begins})

    def receive(self, sublayer: str, stream: Any) -> torch.Tensor:
        return self.readers[sublayer](stream)

    def add(self, sublayer: str, stream: Any, out: torch.Tensor) -> Any:
        return (*stream, out) if self.begins[sublayer] else (*stream[:-1], stream[-1] + out)


class _Pass(DepthPass):
    def __init__(self, reader: nn.Module) -> None:
        self.reader = reader

    def finish(self, stream: Any) -> torch.Tensor:
        return self.reader(stream)


class _Model(DepthModel):
    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.reader = _Reader(d_model, eps)

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        return (h,), _Pass(self.reader)


class _Probe:
    """Stands for a stream: a placement that hands it to ``add`` and returns what comes back leaves the stream alone."""


@dataclass(frozen=True)
class AttentionResiduals(DepthMechanism):
    """Attention over the outputs of earlier sublayers.

    :param blocks: how many blocks the sublayers are divided into; null for the full form, a block per sublayer.
    """

    name = "attention_residuals"
    source = "arXiv 2603.15031"
    no_weight_decay = ("*.depth.readers.*", "depth.reader.*")

    blocks: Count | None = None

    def check(self, model: ModelConfig) -> None:
        if self.blocks is not None and 2 * model.n_layers % self.blocks:
            raise UserError("model.depth.blocks", f"a divisor of the {2 * model.n_layers} sublayers", self.blocks)
        after: Any = _Probe()
        try:
            left_alone = (
                model.norm_placement.combine(_Probe(), None, [lambda x: None] * 2, lambda x, out: after) is after
            )
        except TypeError:
            left_alone = False
        if not left_alone:
            expected = "one that leaves the stream to attention_residuals (N of a sublayer's output alone)"
            raise UserError("model.norm_placement", expected, model.norm_placement.name, "for example pre")

    def _length(self, model: ModelConfig) -> int:
        """Sublayers in a block."""
        return 1 if self.blocks is None else 2 * model.n_layers // self.blocks

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        length = self._length(model)
        begins = {name: (2 * index + i) % length == 0 for i, name in enumerate(("attention", "feed_forward"))}
        return _Layer(model.d_model, model.norm_eps, begins)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model(model.d_model, model.norm_eps)

    def _sources(self, model: ModelConfig) -> list[int]:
        """How many sources each sublayer, and the end, attends over."""
        length = self._length(model)
        return [1 + -(-i // length) for i in range(2 * model.n_layers + 1)]

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 6 * model.d_model * sum(self._sources(model))  # the query, the norm's sum of squares, the weighted sum

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        kept = 2 * model.n_layers if self.blocks is None else self.blocks
        return {"outputs of sublayers": float(kept * tokens * model.d_model * element_size)}

    def block_memory(self, model: ModelConfig, tokens: float, element_size: int) -> float:
        kept = 3.7 if self.blocks is None else 1.3  # of d_model, as the compiler's partitioner saves them
        return kept * model.n_layers * tokens * model.d_model * element_size

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        form = "full" if self.blocks is None else f"{self.blocks} blocks"
        return [("attention residuals", f"{form}, up to {max(self._sources(model))} sources")]
