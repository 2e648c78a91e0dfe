"""Peri-norm: x + N(f(N(x))) (arXiv 2502.02732)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .placement import Add, NormPlacement, Norms


@dataclass(frozen=True)
class Peri(NormPlacement):
    """One norm before the sublayer and another on its output."""

    name = "peri"
    formula = "x + N(f(N(x)))"
    norms = ("", "post")
    olmo_core_block = "peri_norm"

    def receive(self, x: Any, norms: Norms) -> Any:
        return norms[0](x)

    def combine(self, x: Any, out: Any, norms: Norms, add: Add) -> Any:
        return add(x, norms[1](out))
