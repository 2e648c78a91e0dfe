"""DenseFormer (arXiv 2402.02622): after each block, a learned average of all earlier block outputs.

With x_0 the embeddings, x_i the output of block i and weights a, dilation k:

    y_i = sum over j <= i, j = i mod k, of a_ij x_j        block i + 1 receives y_i        a_ii = 1, others 0 at the start

y_0 = x_0; the average after the last block goes to the final norm. With dilation k only every k-th earlier output is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from moda.ranges import Count

from .mechanism import DepthMechanism, DepthModel, DepthPass, Host, SourceMemory, State, set_start

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["DenseFormer"]


class _Pass(DepthPass):
    def __init__(self, averages: nn.ParameterList, dilation: int, outputs: SourceMemory) -> None:
        self.averages, self.dilation, self.outputs = averages, dilation, outputs

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        self.outputs.write(stream)
        read = range((layer + 1) % self.dilation, layer + 2, self.dilation)
        (mixed,) = self.outputs.mix(self.averages[layer][None].to(stream), read)
        return mixed


class _Model(DepthModel):
    def __init__(self, n_layers: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.averages = nn.ParameterList(torch.empty((layer + 1) // dilation + 1) for layer in range(n_layers))
        self.reset_parameters()

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        outputs = host.open_sources(len(self.averages) + 1, h.device)
        outputs.write(h)
        return h, _Pass(self.averages, self.dilation, outputs)

    def reset_parameters(self) -> None:
        for weights in self.averages:
            start = torch.zeros(weights.shape)
            start[-1] = 1
            set_start(weights, start)


def draw_outputs(axes: Any, n_layers: int, dilation: int, title: str) -> None:
    """Draw which block outputs (columns) are mixed after which block (rows)."""
    cells = [(j, i) for i in range(1, n_layers + 1) for j in range(i % dilation, i + 1, dilation)]
    axes.scatter(*zip(*cells), marker="s", s=24, color="#4c78a8", label="block output")
    axes.set(xlabel="output (0: embeddings)", ylabel="after block", title=title)
    axes.set(xlim=(-1, n_layers + 1), ylim=(n_layers + 1, -1))
    axes.legend(loc="upper right", frameon=False)


@dataclass(frozen=True)
class DenseFormer(DepthMechanism):
    """Average block outputs over depth.

    :param dilation: read only every how many of the earlier outputs.
    """

    name = "denseformer"
    source = "arXiv 2402.02622"
    no_weight_decay = ("depth.averages.*",)

    dilation: Count = 1

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model(model.n_layers, self.dilation)

    def _outputs_read(self, model: ModelConfig) -> int:
        return sum((layer + 1) // self.dilation + 1 for layer in range(model.n_layers))

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 2 * model.d_model * self._outputs_read(model)

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return {"block outputs": float(element_size * tokens * model.d_model * (model.n_layers + 1))}

    def backward_memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return {"gradients of block outputs": float(element_size * tokens * model.d_model * (model.n_layers + 1))}

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        return [("block outputs averaged per layer", f"{self._outputs_read(model) / model.n_layers:.1f} on average")]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        draw_outputs(axes, model.n_layers, self.dilation, "averaged block outputs")
