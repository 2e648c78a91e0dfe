"""Delta attention residuals (arXiv 2605.18855): each sublayer adds to the residual stream what it picks of earlier outputs.

With v_0 the embedding, v_i the output of sublayer i, r their sum so far, and a query w and a norm of its own for each sublayer f:

    h = r + sum over i of p_i v_i        p = softmax over i of w . RMSNorm(v_i)        v = f(h)        r <- r + v

The final norm receives r. The first sublayer has nothing to pick from. The block form picks from the embedding and from the sums
of the outputs of finished blocks of layers; a block counts as finished after the next one's first attention. This is the authors'
code (its modes delta and delta_block) but for two things. Their block's sum is the stream less the previous block's sum, which
from the second finished block on is not the block's own; their documentation speaks of the block's own, as here. They draw w like
any linear; here it begins at zero, which is the mean, as in attention residuals. Sources are read and weight decay spares w as
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from moda.errors import UserError
from moda.ranges import Count

from .attention_residuals import (
    ReadersModel,
    check_stream_left_alone,
    draw_sources,
    gradients_memory,
    join,
    read,
    sources_memory,
)
from .mechanism import DepthLayer, DepthMechanism, DepthModel, DepthPass, Host, SourceMemory, State

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["DeltaResiduals"]


class _Layer(DepthLayer):
    """The stream is the attention's input; of its FFN's reader the sum, the LSE and the query; the sum r; and new outputs.

    :param full: whether the attention's output is a source of the FFN.
    """

    def __init__(self, eps: float, full: bool) -> None:
        super().__init__()
        self.eps, self.full = eps, full

    def receive(self, sublayer: str, stream: Any) -> torch.Tensor:
        x, picked, lse, query, total, *new = stream
        if sublayer == "attention":
            return x
        return total + (join(new[0], query, self.eps, picked, lse) if self.full else picked)

    def add(self, sublayer: str, stream: Any, out: torch.Tensor) -> Any:
        return (*stream[:4], stream[4] + out, *stream[5:], out)


class _Pass(DepthPass):
    def __init__(self, readers: nn.ModuleList, length: int | None, sources: SourceMemory, h: torch.Tensor) -> None:
        self.readers, self.length, self.sources = readers, length, sources
        self.unfinished = h

    def enter(self, layer: int, stream: Any) -> tuple[Any, State]:
        feed_forward, x = self.readers[2 * layer], stream
        if not layer or self.length is not None and layer % self.length == 0:  # the FFN has a source more
            if layer:
                x = stream + read([self.readers[2 * layer - 1]], self.sources)[0][0]
            self.sources.write(self.unfinished)
            picked, lse, query = (part[0] for part in read([feed_forward], self.sources))
        else:
            (x, picked), (_, lse), (_, query) = read([self.readers[2 * layer - 1], feed_forward], self.sources)
            x = stream + x
        return (x, picked, lse, query, stream), ()

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        *_, total, attention, feed_forward = stream
        if self.length is not None:
            given = attention + feed_forward
            self.unfinished = given if layer % self.length == 0 else self.unfinished + given
        elif 2 * layer + 1 < len(self.readers):  # nothing reads what the last layer gives
            self.sources.write(attention)
            self.sources.write(feed_forward)
        return total


class _Model(ReadersModel):
    def __init__(self, length: int | None, model: ModelConfig) -> None:
        super().__init__(2 * model.n_layers - 1, model)  # the first sublayer has no sources
        self.length = length

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        n = len(self.readers)
        sources = host.open_sources(n if self.length is None else (n + 1) // 2 // self.length, h.device)
        return h, _Pass(self.readers, self.length, sources, h)


@dataclass(frozen=True)
class DeltaResiduals(DepthMechanism):
    """Attention over the outputs of earlier sublayers, added to the residual stream.

    :param blocks: how many blocks the layers are divided into; null for the full form, where each output is a source.
    """

    name = "delta_residuals"
    source = "arXiv 2605.18855"
    no_weight_decay = ("depth.readers.*",)

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

    def _written(self, model: ModelConfig) -> int:
        """Sources that are not joined within a block alone."""
        return 2 * model.n_layers - 1 if self.blocks is None else self.blocks

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return _Layer(model.norm_eps, self.blocks is None)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model(None if self.blocks is None else model.n_layers // self.blocks, model)

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 6 * model.d_model * sum(self._sources(model))  # the query, the norm's sum of squares, the weighted sum

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        n = model.n_layers
        joined = 2 * n - 1 + (n if self.blocks is None else 0)  # the full form's FFNs join what the attention gives
        return sources_memory(model, self._written(model), joined, tokens, element_size)

    def backward_memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return gradients_memory(model, self._written(model), tokens, element_size)

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        form = "full" if self.blocks is None else f"{self.blocks} blocks"
        return [("delta attention residuals", f"{form}, up to {max(self._sources(model))} sources")]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        draw_sources(axes, self._sources(model), "what is added to the residual stream")
