"""Value residual learning (arXiv 2410.17897): an attention's values mixed with the first layer's.

In layer n > 0, with V_n the layer's own values and V_0 the first layer's (the paper's ResFormer):

    V'_n = a_n V_n + b_n V_0        out = softmax(Q_n K_n^T) V'_n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from .mechanism import (
    AttentionHost,
    Context,
    DepthLayer,
    DepthMechanism,
    DepthModel,
    DepthPass,
    Host,
    Received,
    State,
    local,
    refused_but,
)

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["ValueResidual"]


class _Layer(DepthLayer):
    """Mixes values; the first layer has nothing to mix and gives its values away."""

    def __init__(self, first: bool, learned: bool) -> None:
        super().__init__()
        self.first = first
        self.weights = None if first else nn.Parameter(torch.empty(2), requires_grad=learned)
        self.reset_parameters()

    def attend(
        self, attention: AttentionHost, x: Received, state: State, context: Context
    ) -> tuple[torch.Tensor, State]:
        q, k, v = attention.project(x)
        q, k = attention.normalise(q, attention.q_norm), attention.normalise(k, attention.k_norm)
        q, k = attention.rotate(q, k, context)
        v = v.unflatten(-1, (-1, attention.head_dim))
        if self.weights is None:
            state = (v,)
        else:
            own, first = local(self.weights).to(v.dtype)
            v = own * v + first * state[0]
        return attention.output(attention.attend(q, k, v, context)), state

    def reset_parameters(self) -> None:
        if self.weights is not None:
            nn.init.constant_(self.weights, 0.5)


class _Pass(DepthPass):
    values: State = ()

    def enter(self, layer: int, stream: Any) -> tuple[Any, State]:
        return stream, self.values

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        self.values = state
        return stream


class _Model(DepthModel):
    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        return h, _Pass()


@dataclass(frozen=True)
class ValueResidual(DepthMechanism):
    """Mix each attention's values with the first layer's.

    :param learned: whether the two weights of each layer are trained; both start at 0.5, the paper's fixed weights.
    """

    name = "value_residual"
    source = "arXiv 2410.17897"
    refused = refused_but("tensor_parallel")
    no_weight_decay = ("*.depth.weights",)

    learned: bool = True

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return _Layer(index == 0, self.learned)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model()

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        assert model.n_kv_heads is not None and model.head_dim is not None
        mixed = model.n_layers - 1  # each layer keeps its values for the gradients of the weights
        return {
            "values of the first layer and before mixing": element_size
            * tokens
            * model.n_kv_heads
            * model.head_dim
            * mixed
        }

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        return [("values", f"mixed with the first layer's, {'learned' if self.learned else 'fixed'} weights")]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        layers = range(1, model.n_layers)
        axes.scatter([0] * len(layers), layers, marker="s", s=24, color="#4c78a8", label="values")
        axes.set(xlabel="source layer", ylabel="reading layer", title="values of the first layer")
        axes.set(xlim=(-1, model.n_layers), ylim=(model.n_layers, -1))
        axes.legend(loc="upper right", frameon=False)
