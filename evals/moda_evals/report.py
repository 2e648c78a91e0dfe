"""The same table for a terminal, in Markdown and as CSV."""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from moda.files import write_text
from moda.report.tables import markdown_table

from .paper import SOURCE, paper_rows
from .results import RESULTS, fingerprint, read_results
from .suites import DOWNSTREAM, SUITES, Suite
from .tasks import METRICS

log = logging.getLogger(__name__)


def _cell(value: float | None, error: float | None = None, scale: float = 1.0) -> str:
    return "" if value is None else f"{scale * value:.2f}" + ("" if error is None else f" ± {scale * error:.2f}")


def lines(suite: Suite, results: Sequence[dict[str, Any]], paper: bool = False) -> list[list[str]]:
    """A suite's rows: title, questions or documents, a cell per checkpoint; and the paper's average where one is whole.

    :param paper: add the paper's printed rows as further columns.
    """
    rows = list(paper_rows().values()) if paper else []
    out: list[list[str]] = []
    for name in suite.order(results):
        entries = [r[suite.name].get(name) for r in results]
        cells = ["" if e is None else _cell(e[suite.figure], e["standard_error"], suite.scale) for e in entries]
        cells += [_cell(row.figures[suite.name].get(name)) for row in rows]
        present = [e for e in entries if e is not None]
        out.append([present[0]["title"], "/".join(dict.fromkeys(str(e["n"]) for e in present)), *cells])
    averages = [suite.average(r[suite.name]) for r in results]
    if any(a is not None for a in averages):
        cells = [_cell(a, scale=suite.scale) for a in averages]
        out.append(["mean of the ten", "", *cells, *(_cell(row.averages[suite.name]) for row in rows)])
    return out


def _headings(results: Sequence[dict[str, Any]], paper: bool) -> list[str]:
    return [r["model"]["label"] for r in results] + ([f"{name} (paper)" for name in paper_rows()] if paper else [])


def _windows(results: Sequence[dict[str, Any]]) -> str:
    """How documents were cut; where that differs, by set."""
    by_cut: dict[str, dict[str, None]] = {}
    for entry in (e for r in results for e in r["perplexity"].values()):
        text = "window {size}, stride {stride}".format(**entry["window"])
        text += ", first window of each document only" if entry["window"]["head"] else ""
        by_cut.setdefault(text, {})[entry["title"]] = None
    if len(by_cut) == 1:
        return next(iter(by_cut))
    return "; ".join(f"{text} for {', '.join(titles)}" for text, titles in by_cut.items())


def notes(results: Sequence[dict[str, Any]], paper: bool) -> list[str]:
    """What the figures mean, and what was left out."""
    out: list[str] = []
    if any(r["perplexity"] for r in results):
        meaning = "Perplexity: exp of the mean loss over all scored tokens"
        out.append(f"{meaning}; {_windows(results)}; ± standard error over documents (n).")
    by_metric: dict[str, list[str]] = {}
    for name in DOWNSTREAM.order(results):
        entry = next(r["downstream"][name] for r in results if name in r["downstream"])
        by_metric.setdefault(METRICS.get(entry["metric"], entry["metric"]), []).append(entry["title"])
    if by_metric:
        metrics = "; ".join(f"{metric} for {', '.join(titles)}" for metric, titles in by_metric.items())
        out.append(f"Accuracy in percent ± standard error; n questions; metric: {metrics}.")
    truncated = {name for r in results for name, e in r["downstream"].items() if e["truncated"]}
    if truncated:
        out.append(f"Prompts longer than the context were cut from the left in: {', '.join(sorted(truncated))}.")
    limits = {r["settings"]["limit"] for r in results} - {None}
    if limits:
        out.append(f"Only the first {', '.join(map(str, sorted(limits)))} questions or documents of each set.")
    for r in results:
        out += [f"Left out of {r['model']['label']}: {name}: {why}" for name, why in r["skipped"].items()]
    if paper:
        out.append(f"Paper: {SOURCE}. It does not say which form of MMLU; the lettered one stands beside it here.")
    return out


def table(results: Sequence[dict[str, Any]], paper: bool = False) -> Table:
    """For a terminal."""
    out = Table(show_edge=False, pad_edge=False)
    out.add_column("", no_wrap=True)
    for heading in ("n", *_headings(results, paper)):
        out.add_column(heading, justify="right", no_wrap=heading != "n")
    for suite in SUITES:
        rows = lines(suite, results, paper)
        if rows:
            out.add_section()
            out.add_row(suite.heading, style="bold")
        for row in rows:
            out.add_row(*row)
    return out


def markdown(results: Sequence[dict[str, Any]], paper: bool = False) -> str:
    """The table and its notes."""
    out = []
    for suite in SUITES:
        rows = lines(suite, results, paper)
        if rows:
            out.append(markdown_table([suite.heading, "n", *_headings(results, paper)], rows))
    return "\n".join([*out, *(f"{note}\n" for note in notes(results, paper))])


def tables_of(folder: Path, checkpoint: Path) -> str | None:
    """The Markdown of a folder's results, or None where it has none or they are of another checkpoint, which is logged."""
    if not (folder / RESULTS).is_file():
        return None
    result = read_results(folder)
    measured = result.get("measured_with")
    if not isinstance(measured, dict) or measured.get("checkpoint") != fingerprint(checkpoint):
        log.warning("%s is left out: it was measured on another checkpoint than %s", folder / RESULTS, checkpoint)
        return None
    return markdown([result])


def as_csv(results: Sequence[dict[str, Any]]) -> str:
    """One figure per line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["checkpoint", "suite", "name", "figure", "value", "standard_error", "n"])
    for r in results:
        label = r["model"]["label"]
        for suite in SUITES:
            for name, e in r[suite.name].items():
                for figure, error in suite.figures.items():
                    spread = None if error is None else e[error]
                    writer.writerow([label, suite.name, name, figure, e[figure], spread, e["n"]])
        for name, value in r["averages"].items():
            if value is not None:
                writer.writerow([label, "average", name, name, value, None, None])
    return buffer.getvalue()


def write_reports(results: Sequence[dict[str, Any]], folder: Path, paper: bool = False) -> None:
    """``results.md`` and ``results.csv`` in a folder."""
    write_text(folder / "results.md", markdown(results, paper))
    write_text(folder / "results.csv", as_csv(results))
