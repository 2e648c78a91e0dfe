"""The same table for a terminal, in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .paper import SOURCE, paper_rows
from .sets import PAPER_SETS
from .tasks import TASKS

__all__ = ["Line", "lines", "markdown", "table", "write_reports"]


@dataclass(frozen=True)
class Line:
    """One row of a table: a name, how many questions or documents, and one cell a checkpoint.

    :param suite: ``perplexity`` or ``downstream``.
    """

    suite: str
    title: str
    n: str
    cells: list[str]


def _cell(value: float | None, error: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    text = f"{value * scale:.2f}"
    return text if error is None else f"{text} ± {error * scale:.2f}"


def _order(suite: str, results: Sequence[dict[str, Any]]) -> list[str]:
    known = [s.name for s in PAPER_SETS] if suite == "perplexity" else list(TASKS)
    seen = list(dict.fromkeys(name for r in results for name in r[suite]))
    return [n for n in known if n in seen] + [n for n in seen if n not in known]


def _counts(entries: Sequence[dict[str, Any] | None]) -> str:
    return "/".join(str(n) for n in dict.fromkeys(e["n"] for e in entries if e is not None))


def lines(results: Sequence[dict[str, Any]], paper: bool = False) -> list[Line]:
    """The rows of the table: perplexities, then accuracies in percent, each with the paper's average where it is whole.

    :param paper: add the paper's printed rows as further columns.
    """
    rows = list(paper_rows().values()) if paper else []
    out: list[Line] = []
    for name in _order("perplexity", results):
        entries = [r["perplexity"].get(name) for r in results]
        cells = ["" if e is None else _cell(e["perplexity"], e["standard_error"]) for e in entries]
        cells += [_cell(p.perplexity.get(name), None) for p in rows]
        title = next(e["title"] for e in entries if e is not None)
        out.append(Line("perplexity", title, _counts(entries), cells))
    averages = [r["averages"]["perplexity"] for r in results]
    if any(a is not None for a in averages):
        cells = [_cell(a, None) for a in averages] + [_cell(p.average_perplexity, None) for p in rows]
        out.append(Line("perplexity", "mean of the ten", "", cells))
    for name in _order("downstream", results):
        entries = [r["downstream"].get(name) for r in results]
        cells = ["" if e is None else _cell(e["accuracy"], e["standard_error"], 100) for e in entries]
        cells += [_cell(p.accuracy.get(name), None) for p in rows]
        title = next(e["title"] for e in entries if e is not None)
        out.append(Line("downstream", title, _counts(entries), cells))
    averages = [r["averages"]["accuracy"] for r in results]
    if any(a is not None for a in averages):
        cells = [_cell(a, None, 100) for a in averages] + [_cell(p.average_accuracy, None) for p in rows]
        out.append(Line("downstream", "mean of the ten", "", cells))
    return out


def _headings(results: Sequence[dict[str, Any]], paper: bool) -> list[str]:
    names = [r["model"]["label"] for r in results]
    return names + ([f"{name} (paper)" for name in paper_rows()] if paper else [])


def notes(results: Sequence[dict[str, Any]], paper: bool) -> list[str]:
    """What the figures mean, and what was left out."""
    out: list[str] = []
    measured = [e for r in results for e in r["perplexity"].values()]
    if measured:
        cuts = {(e["window"]["size"], e["window"]["stride"], e["window"]["head"]) for e in measured}
        said = "; ".join(
            f"window {size}, stride {stride}" + (", first window of each document only" if head else "")
            for size, stride, head in sorted(cuts)
        )
        out.append(
            f"Perplexity: exp of the mean loss over all scored tokens; {said}; ± standard error over documents (n)."
        )
    if any(r["downstream"] for r in results):
        out.append("Accuracy in percent ± standard error; n questions; metric: " + _metrics(results) + ".")
    cut = {name for r in results for name, e in r["downstream"].items() if e["truncated"]}
    if cut:
        out.append(f"Prompts longer than the context were cut from the left in: {', '.join(sorted(cut))}.")
    limits = {r["settings"]["limit"] for r in results} - {None}
    if limits:
        out.append(f"Only the first {', '.join(map(str, sorted(limits)))} questions or documents of each set.")
    for r in results:
        out += [f"Left out of {r['model']['label']}: {name}: {why}" for name, why in r["skipped"].items()]
    if paper:
        out.append(f"Paper: {SOURCE}. It does not say which form of MMLU; the lettered one stands beside it here.")
    return out


def _metrics(results: Sequence[dict[str, Any]]) -> str:
    by_metric: dict[str, list[str]] = {}
    for name in _order("downstream", results):
        entry = next(r["downstream"][name] for r in results if name in r["downstream"])
        by_metric.setdefault(entry["metric"], []).append(entry["title"])
    said = {"acc": "log-likelihood", "len_norm": "log-likelihood per character"}
    return "; ".join(f"{said[m]} for {', '.join(titles)}" for m, titles in by_metric.items())


def table(results: Sequence[dict[str, Any]], paper: bool = False) -> Table:
    """For a terminal."""
    out = Table(show_edge=False, pad_edge=False)
    out.add_column("", no_wrap=True)
    out.add_column("n", justify="right")
    for heading in _headings(results, paper):
        out.add_column(heading, justify="right", no_wrap=True)
    suite = None
    for line in lines(results, paper):
        if line.suite != suite:
            suite = line.suite
            out.add_section()
            out.add_row("[bold]perplexity" if suite == "perplexity" else "[bold]accuracy, %")
        out.add_row(line.title, line.n, *line.cells)
    return out


def markdown(results: Sequence[dict[str, Any]], paper: bool = False) -> str:
    """The table and its notes."""
    out = []
    for suite, heading in (("perplexity", "perplexity"), ("downstream", "accuracy, %")):
        chosen = [line for line in lines(results, paper) if line.suite == suite]
        if not chosen:
            continue
        headings = [heading, "n", *_headings(results, paper)]
        out.append("| " + " | ".join(headings) + " |")
        out.append("|---" + "|---:" * (len(headings) - 1) + "|")
        out += ["| " + " | ".join([line.title, line.n, *line.cells]) + " |" for line in chosen]
        out.append("")
    return "\n".join([*out, *(f"{note}\n" for note in notes(results, paper))])


def as_csv(results: Sequence[dict[str, Any]]) -> str:
    """One figure a line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["checkpoint", "suite", "name", "figure", "value", "standard_error", "n"])
    for r in results:
        label = r["model"]["label"]
        for name, e in r["perplexity"].items():
            for figure, error in (
                ("perplexity", e["standard_error"]), ("loss", e["loss_standard_error"]), ("bits_per_byte", None),
            ):  # fmt: skip
                writer.writerow([label, "perplexity", name, figure, e[figure], error, e["n"]])
        for name, e in r["downstream"].items():
            for figure, error in (
                ("accuracy", e["standard_error"]), ("accuracy_raw", None), ("accuracy_per_character", None),
                ("bits_per_byte", None),
            ):  # fmt: skip
                writer.writerow([label, "downstream", name, figure, e[figure], error, e["n"]])
        for name, value in r["averages"].items():
            if value is not None:
                writer.writerow([label, "average", name, name, value, None, None])
    return buffer.getvalue()


def write_reports(results: Sequence[dict[str, Any]], folder: Path, paper: bool = False) -> None:
    """``results.md`` and ``results.csv`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(results, paper), encoding="utf-8")
    (folder / "results.csv").write_text(as_csv(results), encoding="utf-8")
