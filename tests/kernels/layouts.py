"""Layouts of depth slots for the tests: what layers read as plain functions of the candidates before them."""

from __future__ import annotations

from collections.abc import Callable

from moda_kernels import DepthLayout

Choice = Callable[[range], tuple[int, ...]]


def layout(n_layers: int, *, kinds: int = 2, window: int | None = None, choose: Choice = tuple) -> DepthLayout:
    """Every layer reads what ``choose`` takes of the last ``window`` candidates before it (of all without a window)."""
    before = [range(layer * kinds) for layer in range(n_layers)]
    return DepthLayout(tuple(choose(c if window is None else c[-window:]) for c in before), kinds)


#: Choices that are not runs of numbers.
LISTS: dict[str, Choice] = {
    "every-second": lambda c: tuple(c[::2]),
    "scattered": lambda c: tuple(i for i in c if i % 7 in (0, 1, 4)),
    "one-hole": lambda c: tuple(i for i in c if i != 2),
    "first-and-last": lambda c: tuple(sorted({*c[:1], *c[-1:]})),
    "powers-back": lambda c: tuple(sorted(len(c) - 2**i for i in range(9) if 2**i <= len(c))),
}
