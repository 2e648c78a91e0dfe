"""Reordered norm: x + N(f(x)), as OLMo2 was released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .placement import Add, NormPlacement, Norms


@dataclass(frozen=True)
class Reordered(NormPlacement):
    """The norm stands on the sublayer's output, before the addition."""

    name = "reordered"
    formula = "x + N(f(x))"
    olmo_core_block = "reordered_norm"

    def combine(self, x: Any, out: Any, norms: Norms, add: Add) -> Any:
        return add(x, norms[0](out))
