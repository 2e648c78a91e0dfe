"""The two suites, perplexity and downstream: what their results, tables and comparisons have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .sets import PAPER_SETS, SETS
from .tasks import PAPER_TASKS, TASKS


@dataclass(frozen=True, eq=False)
class Suite:
    """A part of ``results.json``.

    :param name: its key there.
    :param figure: the key of an entry's main figure, and of the average in ``averages``.
    :param heading: the figure and its unit in tables.
    :param scale: a figure times this is what tables show.
    :param known: names in the order of tables.
    :param paper: names whose mean is the paper's average.
    :param figures: what the CSV has, and the key of each figure's standard error.
    """

    name: str
    figure: str
    heading: str
    scale: float
    known: Mapping[str, Any]
    paper: tuple[str, ...]
    figures: Mapping[str, str | None]

    def order(self, results: Sequence[dict[str, Any]]) -> list[str]:
        """Names that any of the results has, registered ones first."""
        present = dict.fromkeys(name for r in results for name in r[self.name])
        return [n for n in self.known if n in present] + [n for n in present if n not in self.known]

    def value(self, entry: Mapping[str, Any]) -> float:
        """An entry's main figure in the unit of tables."""
        return self.scale * entry[self.figure]

    def average(self, entries: Mapping[str, dict[str, Any]]) -> float | None:
        """The paper's average of the main figure: None unless all ten are there, measured in one way."""
        chosen = [entries[name] for name in self.paper if name in entries]
        if len(chosen) < len(self.paper) or any(e.get("window") != chosen[0].get("window") for e in chosen):
            return None
        return sum(e[self.figure] for e in chosen) / len(chosen)


PERPLEXITY = Suite(
    "perplexity", "perplexity", "perplexity", 1.0, SETS, PAPER_SETS,
    {"perplexity": "standard_error", "loss": "loss_standard_error", "bits_per_byte": None},
)  # fmt: skip
DOWNSTREAM = Suite(
    "downstream", "accuracy", "accuracy, %", 100.0, TASKS, PAPER_TASKS,
    {"accuracy": "standard_error", "accuracy_raw": None, "accuracy_per_character": None, "bits_per_byte": None},
)  # fmt: skip
SUITES = (PERPLEXITY, DOWNSTREAM)
