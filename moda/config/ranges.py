"""Checks of numbers that sections share."""

from __future__ import annotations

import math

from moda.errors import UserError

__all__ = ["above", "at_least"]


def at_least(key: str, value: float | None, low: float) -> None:
    """Refuse a number below ``low``, infinite or not a number. None passes."""
    if value is not None and not (math.isfinite(value) and value >= low):
        raise UserError(key, f"a number >= {low:g}", value)


def above(key: str, value: float | None, low: float) -> None:
    """Refuse a number not above ``low``, infinite or not a number. None passes."""
    if value is not None and not (math.isfinite(value) and value > low):
        raise UserError(key, f"a number > {low:g}", value)
