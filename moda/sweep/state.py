"""What the folders of a sweep's runs say: which are finished, how far the others are, how fast they run."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moda.checkpoints.find import steps_of
from moda.checkpoints.settings import differences
from moda.config import load_config
from moda.errors import UserError
from moda.files import METRICS_FILE, read_json, read_metrics
from moda.typed import to_dict

from .spec import Cell


@dataclass(frozen=True)
class State:
    """A run's state: ``new``, ``unfinished`` or ``finished``; its last step; and the last line of its figures."""

    kind: str
    step: int = 0
    figures: dict[str, Any] = field(default_factory=dict)


def check_folder(cell: Cell) -> None:
    """:raises UserError: where a run's folder holds one of another configuration."""
    file = cell.folder / "config.yaml"
    if not file.is_file():
        return
    for key, there, wanted in differences(to_dict(load_config(file)), to_dict(cell.config)):
        raise UserError(
            f"run {cell.name}: {key}", f"{wanted!r} as the sweep has it", f"{there!r} in {file}",
            "it is of another sweep or was changed: move the folder away, or choose another folder",
        )  # fmt: skip


def state_of(cell: Cell) -> State:
    """The state of a run's folder, from its figures and its summary."""
    metrics = cell.folder / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else []
    step = lines[-1]["step"] if lines else 0
    figures = {k: v for line in lines[-20:] for k, v in line.items() if v is not None}
    summary = cell.folder / "summary.json"
    if summary.is_file():
        done = read_json(summary, "summary").get("steps", 0)
        if isinstance(done, int) and done >= cell.config.train.steps:
            return State("finished", done, figures)
    return State("unfinished" if steps_of(cell.folder) or lines else "new", step, figures)


def tokens_per_second(folder: Path) -> float | None:
    """The median speed of a run's steps, the first ten left out; None where there are no figures."""
    file = folder / METRICS_FILE
    if not file.is_file():
        return None
    speeds = [line["tokens_per_second"] for line in read_metrics(file) if (line.get("tokens_per_second") or 0) > 0]
    return statistics.median(speeds[10:] or speeds) if speeds else None
