"""Delta attention residuals (arXiv 2605.18855): each sublayer adds to the residual stream what it picks of earlier outputs.

With v_0 the embedding, v_i the output of sublayer i, r their sum so far, and a query w and a norm of its own for each sublayer f:

    h = r + sum over i of p_i v_i        p = softmax over i of w . RMSNorm(v_i)        v = f(h)        r <- r + v

The final norm receives r. The first sublayer has nothing to pick from. The block form picks from the embedding and from the sums
of the outputs of finished blocks of layers; a block counts as finished after the next one's first attention. This is the authors'
code (its modes delta and delta_block) but for two things. Their block's sum is the stream less the previous block's sum, which
from the second finished block on is not the block's own; their documentation speaks of the block's own, as here. They draw w like
any linear; here it begins at zero, which is the mean, as in attention residuals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from moda.errors import UserError
from moda.ranges import Count

from .attention_residuals import Reader, check_stream_left_alone, draw_sources
from .mechanism import DepthLayer, DepthMechanism, DepthModel, DepthPass, Host

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["DeltaResiduals"]


class _Layer(DepthLayer):
    """The stream is the sum and the sources; in the block form the sum, that of the unfinished block, and the sources.

    :param reads: the sublayers that have sources.
    :param begins: whether the layer begins a block; None for the full form.
    """

    def __init__(self, d_model: int, eps: float, reads: tuple[str, ...], begins: bool | None) -> None:
        super().__init__()
        self.begins = begins
        self.readers = nn.ModuleDict({sublayer: Reader(d_model, eps) for sublayer in reads})

    def receive(self, sublayer: str, stream: Any) -> torch.Tensor:
        if sublayer not in self.readers:
            return stream[0]
        return stream[0] + self.readers[sublayer](stream[1 if self.begins is None else 2 :])

    def add(self, sublayer: str, stream: Any, out: torch.Tensor) -> Any:
        total, *rest = stream
        if self.begins is None:
            return (total + out, *(rest or [total]), out)
        unfinished, *sources = rest
        if self.begins and sublayer == "attention":
            return (total + out, out, *sources, unfinished)
        return (total + out, unfinished + out, *sources)


class _Pass(DepthPass):
    def finish(self, stream: Any) -> torch.Tensor:
        return stream[0]


class _Model(DepthModel):
    def __init__(self, full: bool) -> None:
        super().__init__()
        self.full = full

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        return (h,) if self.full else (h, h), _Pass()


@dataclass(frozen=True)
class DeltaResiduals(DepthMechanism):
    """Attention over the outputs of earlier sublayers, added to the residual stream.

    :param blocks: how many blocks the layers are divided into; null for the full form, where each output is a source.
    """

    name = "delta_residuals"
    source = "arXiv 2605.18855"
    graph_per_layer = True

    blocks: Count | None = None

    def check(self, model: ModelConfig) -> None:
        if self.blocks is not None and model.n_layers % self.blocks:
            raise UserError("model.depth.blocks", f"a divisor of the {model.n_layers} layers", self.blocks)
        check_stream_left_alone(model, self.name)

    def _sources(self, model: ModelConfig) -> list[int]:
        """How many sources each sublayer has."""
        if self.blocks is None:
            return [0, *range(2, 2 * model.n_layers + 1)]
        length = model.n_layers // self.blocks
        finished = [-(-layer // length) for layer in range(model.n_layers + 1)]
        return [n for pair in zip(finished, (layer // length + 1 for layer in range(model.n_layers))) for n in pair]

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        reads = tuple(
            name for i, name in enumerate(("attention", "feed_forward")) if self._sources(model)[2 * index + i]
        )
        begins = None if self.blocks is None else index % (model.n_layers // self.blocks) == 0
        return _Layer(model.d_model, model.norm_eps, reads, begins)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model(self.blocks is None)

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 6 * model.d_model * sum(self._sources(model))  # the query, the norm's sum of squares, the weighted sum

    def memory(self, model: ModelConfig, tokens: int, element_size: int) -> dict[str, float]:
        kept = 2 * model.n_layers  # the block form keeps partial sums in their place
        return {"outputs of sublayers": float(kept * tokens * model.d_model * element_size)}

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        form = "full" if self.blocks is None else f"{self.blocks} blocks"
        return [("delta attention residuals", f"{form}, up to {max(self._sources(model))} sources")]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        draw_sources(axes, self._sources(model), "what is added to the residual stream")
