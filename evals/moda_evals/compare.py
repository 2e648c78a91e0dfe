"""Is one checkpoint better than another? Differences with paired bootstrap intervals.

Both models answered the same questions, so their results are resampled together: what both get right or wrong cancels, and
the interval is much narrower than the two standard errors suggest. The interval is the percentile interval; an average's comes
from resampling every task by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moda.errors import UserError

from .paper import paper_rows
from .sets import PAPER_SETS
from .tasks import PAPER_TASKS

__all__ = ["Difference", "compare", "comparison_table", "markdown", "plot"]

_SEED = 0


@dataclass(frozen=True)
class Difference:
    """B minus A on one task (percentage points) or set (percent of A's perplexity).

    :param low: 2.5th percentile of the bootstrap; None where a pairing is not possible.
    :param high: 97.5th percentile.
    :param paper: the same difference in the paper's printed rows.
    """

    suite: str
    name: str
    title: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    n: int
    paper: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def _accuracy_draws(a: str, b: str, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap draws of accuracy(B) - accuracy(A): only three kinds of question matter, so they are drawn as counts."""
    n = len(a)
    wins, losses = sum(x < y for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
    counts = rng.multinomial(n, [wins / n, losses / n, (n - wins - losses) / n], size=draws)
    return (counts[:, 0] - counts[:, 1]) / n


def _perplexity_draws(
    a: Mapping[str, Any], b: Mapping[str, Any], draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap draws of both perplexities over the same documents."""
    la, lb = np.asarray(a["loss"]), np.asarray(b["loss"])
    ta, tb = np.asarray(a["tokens"], dtype=float), np.asarray(b["tokens"], dtype=float)
    out = np.empty((2, draws))
    step = max(1, 2_000_000 // len(la))
    for at in range(0, draws, step):
        index = rng.integers(0, len(la), size=(min(step, draws - at), len(la)))
        out[0, at : at + len(index)] = np.exp(la[index].sum(1) / ta[index].sum(1))
        out[1, at : at + len(index)] = np.exp(lb[index].sum(1) / tb[index].sum(1))
    return out[0], out[1]


def _interval(draws: np.ndarray | None) -> tuple[float | None, float | None]:
    if draws is None:
        return None, None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _paper_pair(names: tuple[str, str] | None) -> tuple[Any, Any] | None:
    if names is None:
        return None
    rows = paper_rows()
    return rows[names[0]], rows[names[1]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _accuracies(a: dict[str, Any], b: dict[str, Any], draws: int, paper: tuple[Any, Any] | None) -> list[Difference]:
    rng = np.random.default_rng(_SEED)
    out: list[Difference] = []
    kept: dict[str, np.ndarray | None] = {}
    for name, left in a["downstream"].items():
        right = b["downstream"].get(name)
        if right is None:
            continue
        paired = left["n"] == right["n"]
        kept[name] = 100 * _accuracy_draws(left["correct"], right["correct"], draws, rng) if paired else None
        printed = None
        if paper is not None and name in paper[0].accuracy:
            printed = paper[1].accuracy[name] - paper[0].accuracy[name]
        x, y = 100 * left["accuracy"], 100 * right["accuracy"]
        out.append(
            Difference("downstream", name, left["title"], x, y, y - x, *_interval(kept[name]), left["n"], printed)
        )
    if all(name in kept for name in PAPER_TASKS):
        chosen = [d for d in out if d.name in PAPER_TASKS]
        parts = [kept[d.name] for d in chosen]
        total = (
            None if any(p is None for p in parts) else np.mean(np.stack([p for p in parts if p is not None]), axis=0)
        )
        printed = None if paper is None else paper[1].average_accuracy - paper[0].average_accuracy
        x, y = _mean([d.a for d in chosen]), _mean([d.b for d in chosen])
        out.append(Difference("downstream", "average", "mean of ten", x, y, y - x, *_interval(total), 0, printed))
    return out


def _perplexities(a: dict[str, Any], b: dict[str, Any], draws: int, paper: tuple[Any, Any] | None) -> list[Difference]:
    rng = np.random.default_rng(_SEED)
    out: list[Difference] = []
    kept: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
    for name, left in a["perplexity"].items():
        right = b["perplexity"].get(name)
        if right is None:
            continue
        paired = left["n"] == right["n"] and left["source"] == right["source"]
        kept[name] = _perplexity_draws(left["documents"], right["documents"], draws, rng) if paired else None
        pair = kept[name]
        ratio = None if pair is None else 100 * (pair[1] / pair[0] - 1)
        printed = None
        if paper is not None and name in paper[0].perplexity:
            printed = 100 * (paper[1].perplexity[name] / paper[0].perplexity[name] - 1)
        x, y = left["perplexity"], right["perplexity"]
        out.append(
            Difference(
                "perplexity", name, left["title"], x, y, 100 * (y / x - 1), *_interval(ratio), left["n"], printed
            )
        )
    if all(s.name in kept for s in PAPER_SETS):
        names = [s.name for s in PAPER_SETS]
        pairs = [kept[n] for n in names]
        total = None
        if all(p is not None for p in pairs):
            means = [np.mean(np.stack([p[side] for p in pairs if p is not None]), axis=0) for side in (0, 1)]
            total = 100 * (means[1] / means[0] - 1)
        printed = None if paper is None else 100 * (paper[1].average_perplexity / paper[0].average_perplexity - 1)
        x, y = (_mean([r["perplexity"][n]["perplexity"] for n in names]) for r in (a, b))
        out.append(
            Difference("perplexity", "average", "mean of ten", x, y, 100 * (y / x - 1), *_interval(total), 0, printed)
        )
    return out


def compare(
    a: dict[str, Any], b: dict[str, Any], *, draws: int = 10_000, paper: tuple[str, str] | None = None
) -> list[Difference]:
    """B against A on everything both were measured on.

    :param draws: bootstrap samples.
    :param paper: two names of :func:`paper_rows` whose printed difference stands beside ours.

    :raises UserError: where the two have nothing in common, or were measured differently.
    """
    for name in set(a["downstream"]) & set(b["downstream"]):
        if a["downstream"][name]["metric"] != b["downstream"][name]["metric"]:
            raise UserError(name, "one metric in both results", "two")
    for name in set(a["perplexity"]) & set(b["perplexity"]):
        cuts = a["perplexity"][name]["window"], b["perplexity"][name]["window"]
        if cuts[0] != cuts[1]:
            raise UserError(name, f"the same window and stride in both results ({cuts[0]})", cuts[1])
    pair = _paper_pair(paper)
    out = _perplexities(a, b, min(draws, 2000), pair) + _accuracies(a, b, draws, pair)
    if not out:
        raise UserError("compare", "results with tasks or sets in common", "none")
    return out


def _columns(d: Difference) -> list[str]:
    unit = "%" if d.suite == "perplexity" else "points"
    interval = "" if d.low is None else f"[{d.low:+.2f}, {d.high:+.2f}]"
    printed = "" if d.paper is None else f"{d.paper:+.2f}"
    return [d.title, str(d.n or ""), f"{d.a:.2f}", f"{d.b:.2f}", f"{d.difference:+.2f} {unit}", interval, printed]


def _headings(a: dict[str, Any], b: dict[str, Any], differences: list[Difference]) -> list[str]:
    head = ["", "n", a["model"]["label"], b["model"]["label"], "difference", "95 % interval"]
    return head + (["paper"] if any(d.paper is not None for d in differences) else [])


def comparison_table(a: dict[str, Any], b: dict[str, Any], differences: list[Difference]) -> Table:
    """For a terminal; differences whose interval leaves out zero are bold."""
    headings = _headings(a, b, differences)
    out = Table(show_edge=False, pad_edge=False)
    for i, heading in enumerate(headings):
        out.add_column(heading, justify="left" if i == 0 else "right")
    for d in differences:
        out.add_row(*_columns(d)[: len(headings)], style="bold" if d.clear else None)
    return out


def markdown(a: dict[str, Any], b: dict[str, Any], differences: list[Difference]) -> str:
    """The comparison with what its columns mean."""
    headings = _headings(a, b, differences)
    out = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    out += ["| " + " | ".join(_columns(d)[: len(headings)]) + " |" for d in differences]
    out += [
        "",
        "Perplexity: relative change, lower is better. Accuracy: percentage points, higher is better. Paired bootstrap.",
        "",
    ]
    return "\n".join(out)


def plot(a: dict[str, Any], b: dict[str, Any], differences: list[Difference], path: Path) -> None:
    """Every difference with its interval, a panel for perplexity and one for accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suites = [s for s in ("perplexity", "downstream") if any(d.suite == s for d in differences)]
    tallest = max(sum(d.suite == s for d in differences) for s in suites)
    figure, axes = plt.subplots(1, len(suites), figsize=(5.5 * len(suites), 1.4 + 0.34 * tallest), squeeze=False)
    for axis, suite in zip(axes[0], suites):
        chosen = [d for d in differences if d.suite == suite]
        for y, d in enumerate(reversed(chosen)):
            colour = (
                "black" if not d.clear else ("tab:blue" if (d.difference > 0) == (suite == "downstream") else "tab:red")
            )
            if d.low is not None and d.high is not None:
                axis.plot([d.low, d.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
            axis.plot(d.difference, y, "o", color=colour, markersize=5)
            if d.paper is not None:
                axis.plot(d.paper, y, "x", color="gray", markersize=6)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(chosen)), [d.title for d in reversed(chosen)])
        axis.set_ylim(-0.6, len(chosen) - 0.4)
        better = "lower is better" if suite == "perplexity" else "higher is better"
        axis.set_xlabel(
            f"perplexity, change in % ({better})" if suite == "perplexity" else f"accuracy, points ({better})"
        )
        axis.spines[["top", "right"]].set_visible(False)
    printed = "; x: the paper's printed difference" if any(d.paper is not None for d in differences) else ""
    figure.suptitle(f"{b['model']['label']} minus {a['model']['label']}, 95 % paired bootstrap{printed}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def best_paper_pair(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    """The printed pair nearest in size: OLMo2 and MoDA at 700M or 1.5B."""
    size = math.sqrt(max(1, a["model"]["parameters"]) * max(1, b["model"]["parameters"]))
    return ("OLMo2-700M", "MoDA-700M") if size < 1.05e9 else ("OLMo2-1.5B", "MoDA-1.5B")
