"""MUDD connections (arXiv 2502.12170): dense connections over depth with weights per token, apart for q, k, v and the residual.

With X_0 the embeddings, X_i the output of block B_i, and four ways c: Q, K, V and R,

    X_i = B_i(Y_{i-1}^Q, Y_{i-1}^K, Y_{i-1}^V, Y_{i-1}^R)       Y_i^c = sum over j <= i of A_ij^c X_j        Y_0^c = X_0

    A_i = GELU(RMSNorm(X_i) W_1) W_2 + a_i      for each token, of all ways at once

Queries, keys and values are projected from the first three, each through the block's norm placement. The attention's output is
added to the fourth, which goes on to the FFN. After the last block there is one mix, for the final norm. RMSNorm has no gain.
With n = i + 1 outputs W_1 is ``[d, h]``, where h is the multiple of 64 next above 4 n (the authors' code), W_2 ``[h, 4 n]``.
At the start W_2 is 0 and a_i reads X_i alone, which is a plain decoder. The authors give queries, keys and values norms of their
own; here they share one, as such gains only scale the columns of w_q, w_k and w_v. Weight decay falls on all parameters, as in
the authors' training code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .denseformer import draw_outputs
from .mechanism import DepthLayer, DepthMechanism, DepthModel, DepthPass, Host, Received, SourceMemory, State, set_start

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["MUDD"]

EPS = 1e-6
WAYS = 4


def _hidden(n: int) -> int:
    """The width between W_1 and W_2 for n outputs."""
    return (WAYS * n // 64 + 1) * 64


class _Mixer(nn.Module):
    """What is mixed after one block: of ``n`` outputs, in ``ways`` ways."""

    def __init__(self, d_model: int, n: int, ways: int, dynamic: bool) -> None:
        super().__init__()
        hidden = _hidden(n)
        self.static = nn.Parameter(torch.empty(ways, n))
        self.w_1 = nn.Linear(d_model, hidden, bias=False) if dynamic else None
        self.w_2 = nn.Parameter(torch.empty(hidden, ways * n)) if dynamic else None
        self.reset_parameters()

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """A ``[B, T, ways, n]`` for the last output ``[B, T, d]``; ``[ways, n]`` if it is the same for all tokens."""
        static = self.static.to(x.dtype)
        if self.w_1 is None or self.w_2 is None:
            return static
        unit = F.rms_norm(x, x.shape[-1:], eps=EPS)
        return (F.gelu(self.w_1(unit)) @ self.w_2).to(x.dtype).unflatten(-1, static.shape) + static

    def forward(self, outputs: SourceMemory, last: torch.Tensor) -> State:
        return outputs.mix(self.weights(last))

    def reset_parameters(self) -> None:
        start = torch.zeros(self.static.shape)
        start[:, -1] = 1
        set_start(self.static, start)
        if self.w_2 is not None:
            nn.init.zeros_(self.w_2)


class _Layer(DepthLayer):
    """The stream that enters is the four inputs; what leaves is the block's output."""

    def receive(self, sublayer: str, stream: Any) -> Received:
        return stream[:-1] if sublayer == "attention" else stream

    def add(self, sublayer: str, stream: Any, out: torch.Tensor) -> Any:
        return (stream[-1] if sublayer == "attention" else stream) + out


class _Pass(DepthPass):
    def __init__(self, mixers: nn.ModuleList, outputs: SourceMemory) -> None:
        self.mixers, self.outputs = mixers, outputs

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        self.outputs.write(stream)
        return self.mixers[layer](self.outputs, stream)

    def finish(self, stream: Any) -> torch.Tensor:
        return stream[-1]


class _Model(DepthModel):
    def __init__(self, model: ModelConfig, dynamic: bool) -> None:
        super().__init__()
        last = model.n_layers - 1
        self.mixers = nn.ModuleList(
            _Mixer(model.d_model, layer + 2, 1 if layer == last else WAYS, dynamic) for layer in range(model.n_layers)
        )

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        outputs = host.open_sources(len(self.mixers) + 1, h.device)
        outputs.write(h)
        return tuple(h.expand(WAYS, *h.shape)), _Pass(self.mixers, outputs)

    def reset_parameters(self) -> None:
        for mixer in self.mixers:
            mixer.reset_parameters()  # type: ignore[operator]


@dataclass(frozen=True)
class MUDD(DepthMechanism):
    """Mix block outputs over depth, apart for queries, keys, values and the residual stream.

    :param dynamic: whether the weights also depend on the token.
    """

    name = "mudd"
    source = "arXiv 2502.12170"

    dynamic: bool = True

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return _Layer()

    def build_model(self, model: ModelConfig) -> DepthModel:
        return _Model(model, self.dynamic)

    def _sums(self, model: ModelConfig) -> int:
        """Outputs that are read for all sums together."""
        n = model.n_layers
        return sum(WAYS * (layer + 2) for layer in range(n - 1)) + n + 1

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        return 2 * model.d_model * self._sums(model)

    def memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        size = float(element_size * tokens * model.d_model)
        out = {
            "block outputs": size * (model.n_layers + 1),
            "inputs of q, k and v": (WAYS - 1) * size * (model.n_layers - 1),
        }
        if self.dynamic:
            widths = [2 * model.d_model + 2 * _hidden(n) + WAYS * n for n in range(2, model.n_layers + 2)]
            out["inputs and hidden layers of the mixers"] = float(element_size * tokens * sum(widths))
        return out

    def backward_memory(self, model: ModelConfig, tokens: float, element_size: int) -> dict[str, float]:
        return {"gradients of block outputs": float(element_size * tokens * model.d_model * (model.n_layers + 1))}

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        kind = "dynamic" if self.dynamic else "static"
        return [
            ("block outputs mixed", f"up to {model.n_layers + 1}, {kind} weights, apart for q, k, v and the residual"),
            ("parameters of the mixers", f"{self.num_params(model):,}"),
        ]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        draw_outputs(axes, model.n_layers, 1, "block outputs mixed for q, k, v and the residual")
