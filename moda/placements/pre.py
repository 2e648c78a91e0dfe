"""Pre-norm: x + f(N(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .placement import Add, NormPlacement, Norms


@dataclass(frozen=True)
class Pre(NormPlacement):
    """The norm stands before the sublayer."""

    name = "pre"
    formula = "x + f(N(x))"
    olmo_core_block = "default"

    def receive(self, x: Any, norms: Norms) -> Any:
        return norms[0](x)

    def combine(self, x: Any, out: Any, norms: Norms, add: Add) -> Any:
        return add(x, out)
