"""Reports on runs: tables and charts of what their folders hold. Needs no torch and imports nothing of the trainer."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import importlib.util
import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from string import Template

from moda.errors import UserError
from moda.files import check_writable, write_text

from .charts import chart_data, draw_losses
from .runs import Run, find_runs
from .tables import build_tables, figures
from .variants import choose_baseline, differing, variants

__all__ = ["FILES", "write_report"]

#: What a report consists of.
FILES = ("report.html", "report.md", "report.csv", "loss.png")


def _plotly() -> str:
    """plotly.js, compressed, in base64: 1.9 MB.

    :raises UserError: if plotly is not installed.
    """
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise UserError("plotly", "an installed package", "none", "pip install -e '.[report]'")
    code = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(code, 6, mtime=0)).decode()


def write_report(folders: Sequence[Path], out: Path, baseline: str | None = None) -> None:
    """Write :data:`FILES` about the runs in these folders, each a run's or one with runs below it.

    :param baseline: the variant or run that the others are compared with; by default the first without a depth mechanism.

    :raises UserError: for folders without runs, an unknown baseline, a place that cannot be written, and without plotly. Nothing
        is written then.
    """
    check_writable("--out", out / FILES[0])
    runs = find_runs(folders)
    all_variants = variants(runs)
    base = choose_baseline(all_variants, baseline)
    all_variants = [base, *(v for v in all_variants if v is not base)]
    plotly = _plotly()
    tables = build_tables(runs, all_variants, base)
    title = str(runs[0].settings.get("name", runs[0].name)) if len(runs) == 1 else f"{len(runs)} runs"
    data = json.dumps(chart_data(all_variants), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    draw_losses(all_variants, out / "loss.png")
    write_text(out / "report.csv", _csv(runs))
    heading = f"# {html.escape(title, quote=False)}\n\n![Loss](loss.png)\n\n"
    write_text(out / "report.md", heading + "\n".join(t.markdown() for t in tables))
    body = "\n".join(t.html() for t in tables)
    write_text(out / "report.html", page.substitute(title=html.escape(title), tables=body, data=data, plotly=plotly))


def _csv(runs: Sequence[Run]) -> str:
    """A line per run: state, the settings that differ, all figures."""
    keys = differing(runs)
    values = figures(runs)
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "state", *keys, *values[0]])
    for run, own in zip(runs, values):
        cells = ("" if math.isnan(v) else repr(v) for v in own.values())
        writer.writerow([run.name, run.state, *(run.settings.get(k) for k in keys), *cells])
    return buffer.getvalue()
