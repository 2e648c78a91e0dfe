"""What a multiple-choice task is: questions with choices, and the metric that picks one of them."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from ..model import TextTokenizer

#: What a choice is scored by.
METRICS = {"acc": "log-likelihood", "len_norm": "log-likelihood per character"}


@dataclass(frozen=True)
class Choice:
    """One possible answer: ids of what stands before it and of itself, and its length as text."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    characters: int
    n_bytes: int


@dataclass(frozen=True)
class Question:
    """A question with its choices; ``label`` is the right one."""

    id: str
    choices: tuple[Choice, ...]
    label: int


@dataclass(frozen=True)
class Task(ABC):
    """A multiple-choice task. Subclasses say where the questions come from.

    :param name: its stable name in options, results and metrics.
    :param title: its name in tables.
    :param metric: a key of :data:`METRICS`.
    :param about: what is asked, in a few words.
    """

    name: str
    title: str
    metric: str
    about: str

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"task {self.name}: metric {self.metric!r} is none of {', '.join(METRICS)}")

    @abstractmethod
    def questions(self, tokenizer: TextTokenizer, limit: int | None) -> list[Question]:
        """The questions in the order of the data, the first ``limit`` only if that is a number."""

    def source(self) -> str | None:
        """What tells other questions under the same name apart, or None if the name does."""
        return None

    def describe(self) -> dict[str, Any]:
        """What tells results of this task from those of another: all that may change an answer."""
        return asdict(self)
