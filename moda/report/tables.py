"""The tables of a report, as plain text cells, and their forms in Markdown and HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .paper import PAPER_TABLES, PaperTable
from .runs import Run, number
from .variants import Estimate, Variant, describe, differences, differing, shown_value, speedup, variants

__all__ = ["Table", "build_tables", "figures", "learning_rates", "markdown_table", "names"]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are aligned to the right."""
    rule = "|---" + "|---:" * (len(headings) - 1) + "|"
    lines = [" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) for row in (headings, *rows)]
    return "\n".join([f"| {lines[0]} |", rule, *(f"| {line} |" for line in lines[1:]), ""])


@dataclass(frozen=True)
class Table:
    """Headings, rows of cells, and what a reader must know of them."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str = ""

    def markdown(self) -> str:
        table = markdown_table([_escape(h) for h in self.headings], [[_escape(c) for c in row] for row in self.rows])
        return f"## {_escape(self.title)}\n\n{table}\n{_escape(self.notes)}\n"

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(row(r, "td") for r in self.rows)
        head = f"<thead>{row(self.headings, 'th')}</thead>" if any(self.headings) else ""
        title, notes = html.escape(self.title), html.escape(self.notes)
        return f"<h2>{title}</h2>\n<div><table>{head}\n<tbody>{body}</tbody></table></div>\n<p>{notes}</p>\n"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[])", r"\\\1", html.escape(text, quote=False))


def figures(runs: Sequence[Run]) -> list[dict[str, float]]:
    """What the table of runs has of each, under the same headings; NaN for what a run lacks."""
    sets, tasks = names(runs)
    out = []
    for run in runs:
        steps = run.of("loss")[0][-1:]
        losses = {name: run.final(f"eval/{name}/loss") for name in sets}
        memory = run.of("memory_gib")[1]
        out.append({
            "parameters": run.sizes.get("parameters", math.nan),
            "FLOPs per token": run.sizes.get("flops_per_token", math.nan),
            "tokens": float(run.tokens(steps).sum()),
            "training loss": run.final("loss"),
            **{f"{name} loss": loss for name, loss in losses.items()},
            **{f"{name} perplexity": math.exp(loss) if loss < 700 else math.nan for name, loss in losses.items()},
            **{f"{name} accuracy, %": 100 * run.final(f"eval/downstream/{name}/accuracy") for name in tasks},
            "tokens/s": run.typical("tokens_per_second"),
            "MFU, %": run.typical("mfu_percent"),
            "peak memory, GiB": float(np.nanmax(memory)) if np.isfinite(memory).any() else math.nan,
            "training time": float(run.seconds(steps).sum()),
        })  # fmt: skip
    return out


def names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The validation sets and the downstream tasks of all these runs."""
    sets = dict.fromkeys(name for run in runs for name in run.validation)
    return list(sets), list(dict.fromkeys(name for run in runs for name in run.tasks))


def _cell(heading: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if heading == "training time":
        return f"{int(value) // 3600}:{int(value) // 60 % 60:02}:{int(value) % 60:02}"
    if heading in ("parameters", "tokens", "FLOPs per token"):
        units = ((1e12, "T"), (1e9, "G" if "FLOP" in heading else "B"), (1e6, "M"), (1e3, "K"))
        size, unit = next(((s, u) for s, u in units if value >= s), (1, ""))
        return f"{value / size:.4g} {unit}".strip()
    return f"{value:.4f}" if heading.endswith("loss") else f"{value:,.0f}" if heading == "tokens/s" else f"{value:.2f}"


def _shown(e: Estimate, form: str = ".4f", of: int = 1) -> str:
    if not e.n:
        return "–"
    margin = f" ± {e.margin:{form.lstrip('+')}}" if e.n > 1 else ""
    return f"{e.mean:{form}}{margin}" + (f" ({e.n} of {of})" if e.n < of else "")


def _runs(runs: Sequence[Run]) -> Table:
    keys = differing(runs)
    values = figures(runs)
    headings = ["run", *(k.removeprefix("model.") for k in keys), *values[0], "state"]
    rows = []
    for run, own in zip(runs, values):
        settings = (shown_value(run.settings[k]) if k in run.settings else "" for k in keys)
        rows.append([run.name, *settings, *(_cell(k, v) for k, v in own.items()), run.state])
    notes = (
        "Training loss: the mean over the last 5 % of the logged steps. Tokens/s and MFU: medians. "
        "Training time leaves out evaluations, checkpoints and compilation."
    )
    if len(runs) == 1:
        return Table("Run", ["", ""], list(zip(headings, rows[0])), notes)
    return Table("Runs", headings, rows, f"Settings: those that differ. {notes}")


def _variants(all_variants: Sequence[Variant], baseline: Variant, sets: Sequence[str]) -> Table:
    metrics = {"training": "loss", **{name: f"eval/{name}/loss" for name in sets}}
    rows = []
    for v in all_variants:
        row = [v.label + (" (baseline)" if v is baseline else ""), f"{len(v.finished)} of {len(v.runs)}"]
        for metric in metrics.values():
            e, d = v.final(metric), differences(v, baseline, metric)
            there = any(len(run.of(metric)[0]) for run in v.finished)
            row.append("not finite" if there and not e.n else _shown(e, of=len(v.finished)))
            row.append("" if v is baseline else f"{_shown(d, '+.4f')} (n = {d.n})" if d.n else "no pair")
        rows.append(row)
    headings = ["variant", "finished", *(h for name in metrics for h in (f"{name} loss", "difference"))]
    notes = (
        "Finished runs alone. ±: half of the 95 % interval over seeds (Student's t), where there are two or more. "
        "Difference: variant minus baseline, paired by seed; n pairs. A loss that is not finite counts in none of them."
    )
    return Table("Variants", headings, rows, notes)


def _speedups(all_variants: Sequence[Variant], baseline: Variant) -> Table:
    rows = []
    for v in all_variants:
        if v is baseline:
            continue
        ratios, reached = speedup(v, baseline)
        if reached:
            cells = [f"{_shown(e, '.3f')}" for e in ratios.values()]
        else:
            cells = ["not reached" if v.finished and baseline.final("loss").n else "no finished run"] * 3
        rows.append([v.label, *cells, f"{reached} of {len(v.finished)}"])
    notes = (
        f"How many times less a variant needs until its training loss, smoothed over 5 % of its steps, stays at or below the "
        f"final loss of {baseline.label} ({_shown(baseline.final('loss'))}). Below 1: it needs more. With a learning rate that "
        "decays to the end of the run, a variant that is ahead would need still less in a schedule of its own."
    )
    return Table("Effective speedup", ["variant", "tokens", "FLOPs", "time", "reached by"], rows, notes)


#: Settings by which a sweep may make runs equal: they do not tell which runs to compare.
_MATCHED = ("model.ffn_hidden_size", "train.max_tokens")


def _gains(runs: Sequence[Run]) -> Table | None:
    """Each depth mechanism, at its best learning rate, against the plain model at its own; None without such a pair."""
    sets, _ = names(runs)
    metric = f"eval/{sets[0]}/loss" if sets else "loss"
    keys = [k for k in differing(runs) if k not in ("train.seed", "optim.lr", *_MATCHED)]
    around = [k for k in keys if not k.startswith("model.depth")]
    groups: dict[str, list[tuple[str, Variant, Estimate]]] = {}
    for mechanism in variants(runs, without=("train.seed", "optim.lr", *_MATCHED)):
        rates = variants(mechanism.runs, without=("train.seed",))
        finals = [(v.final(metric).mean, i) for i, v in enumerate(rates) if v.final(metric).n]
        if finals:
            best = rates[min(finals)[1]]
            run = best.runs[0]
            own = describe(run, [k for k in keys if k not in around and k in run.settings]) or "no mechanism"
            groups.setdefault(describe(run, around), []).append((own, best, best.final(metric)))
    rows = []
    for group, found in groups.items():
        plain = next((v for _, v, _ in found if v.runs[0].settings.get("model.depth", "") is None), None)
        if plain is None or len(found) == 1:
            continue
        for own, v, final in sorted(found, key=lambda item: item[2].mean):
            d = differences(v, plain, metric)
            ratios, reached = speedup(v, plain)
            gain = "" if v is plain else f"{_shown(d, '+.4f')} (n = {d.n})" if d.n else "no pair"
            sooner = ["" if v is plain else _shown(e, ".2f") if reached else "not reached" for e in ratios.values()]
            rate = f"{number(v.runs[0].settings.get('optim.lr')):g}"
            rows.append([group or "all runs", own, rate, _shown(final), gain, *sooner])
    if not rows:
        return None
    headings = ["", "depth", "learning rate", f"{sets[0] if sets else 'training'} loss", "difference"]
    notes = (
        "Each at the learning rate, of those tried, at which that loss is least. Difference: to the plain model of the same "
        "row group, paired by seed. Tokens, FLOPs, time: how many times less is needed to reach its final training loss."
    )
    return Table("What depth gains", [*headings, "tokens", "FLOPs", "time"], rows, notes)


def learning_rates(runs: Sequence[Run]) -> dict[str, dict[float, Estimate]]:
    """The final training loss by learning rate, for each variant that has several; empty where none has."""
    groups = variants(runs, without=("train.seed", "optim.lr"))
    keys = [k for k in differing(runs) if k not in ("train.seed", "optim.lr")]
    out: dict[str, dict[float, Estimate]] = {}
    for group in groups:
        by_rate: dict[float, list[float]] = {}
        for run in group.finished:
            by_rate.setdefault(number(run.settings.get("optim.lr")), []).append(run.final("loss"))
        label = describe(group.runs[0], keys) or "all runs"
        out[label] = {rate: Estimate.of(losses) for rate, losses in sorted(by_rate.items())}
    return out if any(len(rates) > 1 for rates in out.values()) else {}


def _learning_rates(curves: dict[str, dict[float, Estimate]]) -> Table:
    rates = sorted({rate for curve in curves.values() for rate in curve})
    rows = []
    for label, curve in curves.items():
        finite = {rate: e for rate, e in curve.items() if e.n}
        best = min(finite, key=lambda rate: finite[rate].mean) if finite else None
        cells = [("not finite" if not curve[r].n else _shown(curve[r])) if r in curve else "" for r in rates]
        rows.append([label, *cells, "–" if best is None else f"{best:g}"])
    return Table("Learning rate", ["variant", *(f"{r:g}" for r in rates), "best"], rows, "Final training loss.")


def _paper(paper: PaperTable, all_variants: Sequence[Variant]) -> Table | None:
    """The paper's rows and ours beside them; None if no run is one of them."""
    ours: dict[object, list[Variant]] = {}
    for v in all_variants:
        row = paper.row(v.runs[0].settings)
        if row is not None:
            ours.setdefault(row, []).append(v)
    if not ours:
        return None
    headings = ["row", *(f"{name}: {who}" for name in paper.figures for who in ("paper", "ours")), "our run"]
    rows = []
    for row, printed in paper.rows.items():
        beside = [(v.label, _like_paper(paper, v)) for v in ours.get(row, [])] or [("", [""] * len(printed))]
        for label, values in beside:
            rows.append([row[0], *(cell for p, o in zip(printed, values) for cell in (f"{p:g}", o)), label])
    notes = (
        "arXiv 2603.15619. A run stands in the row that has its shape and mechanism, whatever its data, budget and schedule: "
        "figures compare only where these are the paper's."
    )
    return Table(f"The paper's {paper.title}", headings, rows, notes)


def _like_paper(paper: PaperTable, v: Variant) -> list[str]:
    """A variant's figures as the paper prints them."""
    sets, tasks = names(v.runs)
    name = next((s for s in sets if s.startswith(paper.validation)), sets[0] if sets else "")
    loss, training = v.final(f"eval/{name}/loss"), v.final("loss")
    accuracy = [v.final(f"eval/downstream/{task}/accuracy").mean for task in tasks]
    values = {
        "parameters, M": v.runs[0].sizes.get("parameters", math.nan) / 1e6,
        "forward TFLOPs": v.runs[0].sizes.get("forward_flops", math.nan) / 1e12,
        "forward GFLOPs": v.runs[0].sizes.get("forward_flops_causal", math.nan) / 1e9,
        "training perplexity": math.exp(training.mean) if training.n else math.nan,
        "validation perplexity (C4)": math.exp(loss.mean) if loss.n else math.nan,
        "downstream mean, %": 100 * sum(accuracy) / len(accuracy) if accuracy else math.nan,
    }
    cells = {key: f"{value:.2f}" if math.isfinite(value) else "–" for key, value in values.items()}
    cells["validation loss (FineWeb-Edu)"] = _shown(loss)
    if loss.n and not name.startswith(paper.validation):
        for key in ("validation perplexity (C4)", "validation loss (FineWeb-Edu)"):
            cells[key] += f" (on {name})"
    if accuracy:
        cells["downstream mean, %"] += f" ({len(tasks)} tasks)"
    return [cells[figure] for figure in paper.figures]


def build_tables(runs: Sequence[Run], all_variants: Sequence[Variant], baseline: Variant) -> list[Table]:
    """All that apply to these runs, the table of single runs last."""
    tables = [_variants(all_variants, baseline, names(runs)[0])] if len(runs) > 1 else []
    if (gains := _gains(runs)) is not None:
        tables.insert(0, gains)
    if len(all_variants) > 1:
        tables.append(_speedups(all_variants, baseline))
    if curves := learning_rates(runs):
        tables.append(_learning_rates(curves))
    papers = (_paper(paper, all_variants) for paper in PAPER_TABLES)
    return [*tables, *(table for table in papers if table is not None), _runs(runs)]
