"""Post-norm: N(x + f(x)), the placement of the MoDA paper's "postnorm" (the authors' script)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .placement import Add, NormPlacement, Norms


@dataclass(frozen=True)
class Post(NormPlacement):
    """The norm stands after the addition, on the stream itself."""

    name = "post"
    formula = "N(x + f(x))"

    def combine(self, x: Any, out: Any, norms: Norms, add: Add) -> Any:
        return norms[0](add(x, out))
