"""Is one checkpoint better than another? Differences with paired bootstrap intervals.

Both models answered the same questions, so their results are resampled together: what both get right or wrong cancels, and
the interval is much narrower than the two standard errors suggest. The interval is the percentile interval; an average's comes
from resampling every task by itself.
"""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moda.errors import UserError
from moda.files import writing
from moda.report.tables import markdown_table

from .paper import paper_rows
from .suites import DOWNSTREAM, PERPLEXITY, SUITES, Suite

_SEED = 0
_MOST_DRAWS = 1_000_000


@dataclass(frozen=True)
class Difference:
    """B minus A on one task (percentage points) or set (percent of A's perplexity).

    :param n: questions or documents in A; 0 for an average.
    :param low: 2.5th percentile of the bootstrap; None where a pairing is not possible.
    :param high: 97.5th percentile.
    :param paper: the same difference in the paper's printed rows.
    """

    suite: str
    name: str
    title: str
    n: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    paper: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def _paired(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two entries are of the same questions or documents."""
    return a["n"] == b["n"] and a.get("source") == b.get("source")


def _accuracy_draws(a: dict[str, Any], b: dict[str, Any], draws: int, rng: np.random.Generator) -> np.ndarray:
    """``[2, draws]``, drawn as counts of four kinds: questions that neither, only A, only B or both get right."""
    n = len(a["correct"])
    kinds = np.bincount([2 * (y == "1") + (x == "1") for x, y in zip(a["correct"], b["correct"])], minlength=4)
    counts = rng.multinomial(n, kinds / n, size=draws)
    return 100 * (counts[:, 1:3] + counts[:, 3:]).T / n


def _perplexity_draws(a: dict[str, Any], b: dict[str, Any], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Both perplexities over the same documents, ``[2, draws]``."""
    documents = [(np.asarray(e["documents"]["loss"]), np.asarray(e["documents"]["tokens"], float)) for e in (a, b)]
    out = np.empty((2, draws))
    n = len(documents[0][0])
    step = max(1, 2_000_000 // n)
    for at in range(0, draws, step):
        index = rng.integers(0, n, size=(min(step, draws - at), n))
        for row, (loss, tokens) in zip(out, documents):
            row[at : at + len(index)] = np.exp(loss[index].sum(1) / tokens[index].sum(1))
    return out


def _change(suite: Suite, a: Any, b: Any) -> Any:
    """B against A in the unit of :class:`Difference`; of numbers or of draws."""
    return 100 * (b / a - 1) if suite is PERPLEXITY else b - a


def _differences(
    suite: Suite, a: dict[str, Any], b: dict[str, Any], draws: int, paper: tuple[str, str] | None
) -> list[Difference]:
    rng = np.random.default_rng(_SEED)
    resample = _perplexity_draws if suite is PERPLEXITY else _accuracy_draws
    paper_pair = [] if paper is None else [paper_rows()[name] for name in paper]
    out: list[Difference] = []
    samples: dict[str, np.ndarray | None] = {}  # None where the two cannot be paired

    def add(name: str, title: str, n: int, x: float, y: float, drawn: np.ndarray | None, rows: list[float]) -> None:
        low, high = (None, None) if drawn is None else np.percentile(_change(suite, *drawn), [2.5, 97.5]).tolist()
        changes = _change(suite, x, y), low, high, _change(suite, *rows) if rows else None
        out.append(Difference(suite.name, name, title, n, x, y, *changes))

    left, right = a[suite.name], b[suite.name]
    for name in (n for n in suite.order([a]) if n in right):
        x, y = left[name], right[name]
        samples[name] = resample(x, y, draws, rng) if _paired(x, y) else None
        rows = [row.figures[suite.name][name] for row in paper_pair if name in suite.paper]
        add(name, x["title"], x["n"], suite.value(x), suite.value(y), samples[name], rows)
    x_mean, y_mean = suite.average(left), suite.average(right)
    if x_mean is not None and y_mean is not None:
        parts = [drawn for name in suite.paper if (drawn := samples[name]) is not None]
        drawn = np.mean(parts, 0) if len(parts) == len(suite.paper) else None
        rows = [row.averages[suite.name] for row in paper_pair]
        add("average", "mean of ten", 0, suite.scale * x_mean, suite.scale * y_mean, drawn, rows)
    return out


def compare(
    a: dict[str, Any], b: dict[str, Any], *, draws: int = 10_000, paper: tuple[str, str] | None = None
) -> list[Difference]:
    """B against A on everything both were measured on.

    :param draws: bootstrap samples; at most 2,000 of perplexities.
    :param paper: two names of :func:`paper_rows` whose printed difference stands beside ours.

    :raises UserError: where the two have nothing in common, or were measured differently.
    """
    if not 1 <= draws <= _MOST_DRAWS:
        raise UserError("--draws", f"a number from 1 to {_MOST_DRAWS:,}", draws)
    for suite, key, what in ((DOWNSTREAM, "metric", "metric"), (PERPLEXITY, "window", "window and stride")):
        for name in a[suite.name].keys() & b[suite.name].keys():
            x, y = a[suite.name][name][key], b[suite.name][name][key]
            if x != y:
                raise UserError(name, f"the same {what} in both results ({x})", y)
    out = _differences(PERPLEXITY, a, b, min(draws, 2000), paper) + _differences(DOWNSTREAM, a, b, draws, paper)
    if not out:
        raise UserError("compare", "results with tasks or sets in common", "; ".join(remarks(a, b)) or "none")
    return out


def remarks(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What is in one of the results only, and what both have but not of the same questions or documents."""
    out = []
    for letter, one, other in (("A", a, b), ("B", b, a)):
        titles = [e["title"] for s in SUITES for name, e in one[s.name].items() if name not in other[s.name]]
        if titles:
            out.append(f"only in {letter} ({one['model']['label']}): {', '.join(titles)}")
    for suite in SUITES:
        for name in suite.order([a]):
            x, y = a[suite.name][name], b[suite.name].get(name)
            if y is not None and not _paired(x, y):
                kind = "n" if x["n"] != y["n"] else "source"
                counts = f"{kind} {x.get(kind)} and {y.get(kind)}"
                out.append(f"no interval for {x['title']}, measured on different data: {counts}")
    return out


def _cells(a: dict[str, Any], b: dict[str, Any], differences: list[Difference]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; the paper's column only where it says something."""
    headings = ["", "n", a["model"]["label"], b["model"]["label"], "difference", "95 % interval", "paper"]
    width = 7 if any(d.paper is not None for d in differences) else 6
    rows = []
    for d in differences:
        change = f"{d.difference:+.2f} {'%' if d.suite == PERPLEXITY.name else 'points'}"
        interval = "" if d.low is None else f"[{d.low:+.2f}, {d.high:+.2f}]"
        paper = "" if d.paper is None else f"{d.paper:+.2f}"
        rows.append([d.title, str(d.n or ""), f"{d.a:.2f}", f"{d.b:.2f}", change, interval, paper][:width])
    return headings[:width], rows


def comparison_table(a: dict[str, Any], b: dict[str, Any], differences: list[Difference]) -> Table:
    """For a terminal; differences whose interval leaves out zero are bold, and :func:`remarks` stand below."""
    headings, rows = _cells(a, b, differences)
    out = Table(show_edge=False, pad_edge=False, caption="\n".join(remarks(a, b)) or None, caption_justify="left")
    for i, heading in enumerate(headings):
        out.add_column(heading, justify="left" if i == 0 else "right")
    for d, row in zip(differences, rows):
        out.add_row(*row, style="bold" if d.clear else None)
    return out


def markdown(a: dict[str, Any], b: dict[str, Any], differences: list[Difference]) -> str:
    """The comparison with what its columns mean."""
    meaning = "Perplexity: relative change, lower is better. Accuracy: percentage points, higher is better."
    notes = [f"{meaning} Paired bootstrap.", *remarks(a, b)]
    return "\n".join([markdown_table(*_cells(a, b, differences)), *(f"{note}\n" for note in notes)])


def _draw_panel(axis: Any, suite: Suite, chosen: list[Difference]) -> None:
    for y, d in enumerate(reversed(chosen)):
        colour = "black" if not d.clear else "tab:blue" if (d.difference > 0) == (suite is DOWNSTREAM) else "tab:red"
        if d.low is not None:
            axis.plot([d.low, d.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axis.plot(d.difference, y, "o", color=colour, markersize=5)
        if d.paper is not None:
            axis.plot(d.paper, y, "x", color="gray", markersize=6)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_yticks(range(len(chosen)), [d.title for d in reversed(chosen)])
    label = "perplexity, change in % (lower" if suite is PERPLEXITY else "accuracy, points (higher"
    axis.set(xlabel=f"{label} is better)", ylim=(-0.6, len(chosen) - 0.4))
    axis.spines[["top", "right"]].set_visible(False)


def plot(a: dict[str, Any], b: dict[str, Any], differences: list[Difference], path: Path) -> None:
    """Every difference with its interval, a panel for perplexity and one for accuracy.

    :raises UserError: for a name whose ending is no format of matplotlib's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {s: chosen for s in SUITES if (chosen := [d for d in differences if d.suite == s.name])}
    paper = "; x: the paper's printed difference" if any(d.paper is not None for d in differences) else ""
    title = f"{b['model']['label']} minus {a['model']['label']}, 95 % paired bootstrap{paper}"
    wrapped = textwrap.wrap(title, 60 * len(panels))  # characters of 10 points in the figure's width
    height = 1.2 + 0.2 * len(wrapped) + 0.34 * max(map(len, panels.values()))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), height), squeeze=False)
    try:
        formats = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in formats:
            raise UserError("--plot", f"a file name that ends in one of {', '.join(sorted(formats))}", str(path))
        for axis, (suite, chosen) in zip(axes[0], panels.items()):
            _draw_panel(axis, suite, chosen)
        figure.suptitle("\n".join(wrapped), fontsize=10)
        figure.tight_layout()
        with writing(path, "wb") as f:
            figure.savefig(f, dpi=150, format=path.suffix[1:].lower(), bbox_inches="tight")
    finally:
        plt.close(figure)


def best_paper_pair(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    """The printed pair nearest in size: OLMo2 and MoDA at 700M or 1.5B."""
    size = math.sqrt(max(1, a["model"]["parameters"]) * max(1, b["model"]["parameters"]))
    return ("OLMo2-700M", "MoDA-700M") if size < 1.05e9 else ("OLMo2-1.5B", "MoDA-1.5B")
