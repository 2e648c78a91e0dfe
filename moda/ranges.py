"""Ranges of numbers, written in their types: ``lr: Annotated[float, Range(0, above=True)]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

__all__ = ["Count", "Natural", "NotNegative", "Positive", "Range", "Seed", "Share", "Steps", "Tokens"]


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``.

    :param above: without ``low`` itself.
    :param below: without ``high`` itself.
    :param unit: what is counted.
    """

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False
    unit: str = ""

    def __contains__(self, value: float) -> bool:
        over = self.low < value if self.above else self.low <= value
        return over and (self.high is None or (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        if self.high is None:
            return f"{'>' if self.above else '>='} {self.low}"
        if self.above:
            return f"between {self.low} and {self.high}" if self.below else f"above {self.low}, at most {self.high}"
        return f"from {self.low} to {'below ' if self.below else ''}{self.high}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Steps = Annotated[int, Range(1, unit="steps")]
Tokens = Annotated[int, Range(1, unit="tokens")]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what numpy takes
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
