"""The printed rows of the paper's Tables 4 and 5 (arXiv 2603.15619), for comparison.

All four models were trained on 400 B tokens. Accuracies are percentages, perplexities as printed; the last figure of a row is
the paper's own average.
"""

from dataclasses import dataclass

from .suites import SUITES

SOURCE = "arXiv 2603.15619, Tables 4 and 5 (400 B tokens)"

_PRINTED: dict[str, dict[str, tuple[float, ...]]] = {
    "downstream": {
        "OLMo2-700M": (73.72, 58.77, 55.33, 35.60, 56.24, 89.50, 66.84, 33.44, 77.00, 24.69, 57.11),
        "MoDA-700M": (73.39, 59.19, 60.22, 37.20, 59.33, 89.60, 67.37, 34.78, 82.00, 25.61, 58.87),
        "OLMo2-1.5B": (76.55, 65.86, 63.22, 38.80, 63.61, 90.60, 72.98, 42.47, 81.00, 27.73, 62.28),
        "MoDA-1.5B": (76.82, 66.24, 65.59, 41.60, 67.34, 92.10, 72.81, 46.82, 85.00, 29.59, 64.39),
    },
    "perplexity": {
        "OLMo2-700M": (18.32, 17.43, 24.37, 9.53, 12.26, 16.78, 20.53, 9.17, 23.84, 3.93, 15.61),
        "MoDA-700M": (18.29, 17.24, 23.64, 9.48, 12.06, 16.58, 20.52, 9.14, 23.75, 3.90, 15.46),
        "OLMo2-1.5B": (16.16, 15.37, 21.10, 8.45, 10.41, 14.19, 18.13, 8.19, 21.21, 3.57, 13.67),
        "MoDA-1.5B": (15.97, 15.08, 20.92, 8.33, 10.16, 13.95, 17.88, 8.09, 20.85, 3.52, 13.47),
    },
}


@dataclass(frozen=True)
class PaperRow:
    """One model's printed figures by suite and our name of the task or set, and its averages by suite."""

    name: str
    figures: dict[str, dict[str, float]]
    averages: dict[str, float]


def paper_rows() -> dict[str, PaperRow]:
    """The four models of the tables."""
    return {
        name: PaperRow(
            name,
            {s.name: dict(zip(s.paper, _PRINTED[s.name][name])) for s in SUITES},
            {s.name: _PRINTED[s.name][name][-1] for s in SUITES},
        )
        for name in _PRINTED["downstream"]
    }
