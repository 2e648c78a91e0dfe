"""Curves of a report: as data for the page's charts, and as a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moda.files import writing

from .runs import Array, Run
from .tables import learning_rates, names
from .variants import Variant

__all__ = ["chart_data", "draw_losses"]

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b", "#ff9da6", "#79706e")
DASHES = ("solid", "dash", "dot", "dashdot")
LINES = dict(zip(DASHES, ("-", "--", ":", "-.")))  # what matplotlib calls them
AXES = ("tokens", "training FLOPs", "training hours")
POINTS = 400  # of a line


def _style(i: int, group: str) -> dict[str, str]:
    """How the lines of the i-th variant look."""
    return {"group": group, "colour": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)]}


def _thin(steps: Array, values: Array) -> tuple[Array, Array]:
    """At most :data:`POINTS` points: means over as many steps each, at the last of them. NaN stays NaN."""
    starts = np.unique(np.linspace(0, len(steps), min(POINTS, len(steps)), endpoint=False).astype(int))
    ends = np.append(starts[1:], len(steps))
    return steps[ends - 1], np.add.reduceat(values, starts) / (ends - starts)


def _curve(run: Run, metric: str) -> tuple[Array, Array]:
    """What is drawn of a metric: the training loss smoothed, others as they are."""
    return _thin(*(run.smooth() if metric == "loss" else run.of(metric)))


def _plain(values: Array) -> list[float | None]:
    """For JSON: five significant digits, null for what is not finite."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


def _along(run: Run, steps: Array) -> list[Array]:
    return [run.tokens(steps), run.flops(steps), run.seconds(steps) / 3600]


def _range(curves: Sequence[Array]) -> list[float] | None:
    """The losses of several runs after the first fifth of each: the beginning would squeeze what tells them apart."""
    late = np.concatenate([c[len(c) // 5 :] for c in curves]) if len(curves) > 1 else np.empty(0)
    late = late[np.isfinite(late)]
    if not len(late):
        return None
    low, high = float(late.min()), float(np.quantile(late, 0.995))
    return [low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3]


def chart_data(all_variants: Sequence[Variant]) -> dict[str, Any]:
    """What the page draws: ``xs``, the abscissae that lines share, and ``charts``."""
    xs: dict[bytes, list[list[float | None]]] = {}
    charts: list[dict[str, Any]] = []
    drawn = [(run, _style(i, v.label)) for i, v in enumerate(all_variants) for run in v.runs]
    runs = [run for run, _ in drawn]
    sets, tasks = names(runs)

    def line(name: str, style: dict[str, str], columns: Sequence[Array], y: Array) -> dict[str, Any]:
        key = b"".join(c.tobytes() for c in columns)
        xs.setdefault(key, [_plain(c) for c in columns])
        style = style | {"group": html.escape(style["group"])}
        return {"name": html.escape(name), **style, "x": list(xs).index(key), "y": _plain(y)}

    def chart(title: str, y: str, axes: Sequence[str], lines: list[dict[str, Any]], **more: Any) -> None:
        if lines:
            charts.append({"title": html.escape(title), "y": html.escape(y), "axes": axes, "lines": lines, **more})

    by_step = {
        "loss": ("Training loss, smoothed over 5 % of the steps", "loss"),
        **{f"eval/{name}/loss": (f"Validation loss: {name}", "loss") for name in sets},
        **{f"eval/downstream/{name}/accuracy": (f"Accuracy: {name}", "accuracy") for name in tasks},
        "grad_norm": ("Gradient norm", "norm"), "lr": ("Learning rate", "learning rate"),
        "tokens_per_second": ("Speed", "tokens/s"),
    }  # fmt: skip
    for metric, (title, y) in by_step.items():
        curves = [(run, style, *_curve(run, metric)) for run, style in drawn if len(run.of(metric)[0])]
        lines = [line(run.name, style, _along(run, steps), values) for run, style, steps, values in curves]
        if len(runs) == 1 and metric == "loss" and lines:
            steps, values = _thin(*runs[0].of("loss"))
            pale = {"group": "not smoothed", "colour": "#ccc", "dash": "solid"}
            lines.insert(0, line(runs[0].name, pale, _along(runs[0], steps), values))
        chart(title, y, AXES, lines, range=_range([c[-1] for c in curves]) if y == "loss" else None)
    profiles = [(run.profiles(), run.name, style) for run, style in drawn]
    for metric in dict.fromkeys(name for own, *_ in profiles for name in own):
        lines = [line(name, style, own[metric][:1], own[metric][1]) for own, name, style in profiles if metric in own]
        chart(f"{metric} by layer, at the end", metric, ["layer"], lines)
    lines = []
    for i, (label, curve) in enumerate(learning_rates(runs).items()):
        means, margins = np.array([(e.mean, e.margin) for e in curve.values()]).reshape(-1, 2).T
        lines.append(line(label, _style(i, label), [np.array(list(curve))], means) | {"margin": _plain(margins)})
    chart("Final training loss by learning rate", "loss", ["learning rate"], lines, log=True)
    return {"xs": list(xs.values()), "charts": charts}


def _draw_ranking(ax: Any, all_variants: Sequence[Variant], metric: str) -> None:
    """Final values by variant, the least on top: every seed's, their mean, and its 95 % interval."""
    found = [(v.final(metric), i, v) for i, v in enumerate(all_variants)]
    ranked = sorted((x for x in found if x[0].n and math.isfinite(x[0].mean)), key=lambda x: -x[0].mean)
    for y, (estimate, i, v) in enumerate(ranked):
        colour = _style(i, v.label)["colour"]
        margin = 0.0 if math.isnan(estimate.margin) else estimate.margin
        ax.errorbar(estimate.mean, y, xerr=margin, color=colour, marker="D", markersize=6, capsize=4)
        ax.annotate(f"{estimate.mean:.3f}", (estimate.mean, y), (8, 4), textcoords="offset points", fontsize="small")
        if estimate.n > 1:
            values = [run.final(metric) for run in v.finished]
            ax.plot(values, [y] * len(values), ".", color=colour, alpha=0.5)
    ax.set_yticks(range(len(ranked)), [v.label.replace("$", r"\$") for _, _, v in ranked], fontsize="small")
    ax.margins(x=0.12)
    ax.grid(alpha=0.3)


def draw_losses(all_variants: Sequence[Variant], path: Path) -> None:
    """Training losses, and those of the first validation set, over tokens and, of several runs, FLOPs and time.

    Runs that were validated at their end alone are ranked by it instead.
    """
    from matplotlib.figure import Figure

    runs = [run for v in all_variants for run in v.runs]
    metrics = {"training loss, smoothed": "loss"}
    metrics |= {f"validation loss ({name})": f"eval/{name}/loss" for name in names(runs)[0][:1]}
    columns = range(3) if len(runs) > 1 else range(1)  # of one run all three look alike
    known = [k for k in columns if any(np.isfinite(_along(r, r.of("loss")[0])[k]).any() for r in runs)] or [0]
    figure = Figure(figsize=(5 * len(known) + 1, 3.8 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(known), squeeze=False)
    for row, (title, metric) in zip(axes, metrics.items()):
        if metric != "loss" and len(all_variants) > 1 and all(len(run.of(metric)[0]) < 2 for run in runs):
            whole = figure.add_subplot(row[0].get_gridspec()[1, :])
            for ax in row:
                ax.remove()
            figure.set_size_inches(5 * len(known) + 1, 3.8 + max(2.0, 0.28 * len(all_variants) + 0.8))
            _draw_ranking(whole, all_variants, metric)
            whole.set(xlabel=f"{title}, at the end")
            continue
        curves = []
        for i, v in enumerate(all_variants):
            style = _style(i, v.label)
            label = " " + v.label.replace(
                "$", r"\$"
            )  # neither a formula nor, with "_" first, one that legends leave out
            for n, run in enumerate(run for run in v.runs if len(run.of(metric)[0])):
                steps, values = _curve(run, metric)
                curves.append(values)
                for ax, k in zip(row, known):
                    (drawn,) = ax.plot(
                        _along(run, steps)[k], values, LINES[style["dash"]], color=style["colour"], linewidth=1.2
                    )
                    drawn.set(label=None if n else label, marker="." if len(steps) < 60 else "")
        for ax, k in zip(row, known):
            ax.set(xlabel=AXES[k], ylabel=title, ylim=_range(curves))
            ax.grid(alpha=0.3)
            ax.locator_params(axis="x", nbins=5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if 1 < len(labels) <= 40:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    with writing(path, "wb") as f:
        figure.savefig(f, dpi=120, format="png")
