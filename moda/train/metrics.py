"""The figures of a run, under stable names: in ``metrics.jsonl``, on the terminal and in the log."""

import json
import math
import os
from pathlib import Path
from typing import Any

from moda.files import METRICS_FILE, read_metrics, writing

# OLMo-core's names of what a step reports, and ours.
_NAMES = {
    "train/CE loss": "loss",
    "train/PPL": "perplexity",
    "train/Z loss": "z_loss",
    "optim/total grad norm": "grad_norm",
    "optim/LR (group 0)": "lr",
    "optim/LR": "lr",
    "throughput/total tokens": "tokens",
    "throughput/device/TPS": "tokens_per_second_per_device",
    "throughput/device/MFU": "mfu_percent",
    "throughput/device/data loading (%)": "data_loading_percent",
    "gpu_memory/GPU reserved mem (GiB)": "memory_gib",
    "system/memory_gib": "memory_gib",
    "optim/step skipped": "step_skipped",
}


def stable_name(name: str) -> str | None:
    """This project's name of a metric of OLMo-core's, or None if it has none: evaluations become
    ``eval/<set>/loss``, figures of layers ``<name>/layer<N>``."""
    if name.startswith("eval/lm/"):
        return name.replace("eval/lm/", "eval/", 1).replace("/CE loss", "/loss").replace("/PPL", "/perplexity")
    if name.startswith("layers/"):
        return name.removeprefix("layers/")
    return name if name.startswith("eval/") else _NAMES.get(name)


def select(metrics: dict[str, float]) -> dict[str, float]:
    """OLMo-core's metrics of one step under this project's names, without those that have none."""
    return {ours: value for name, value in metrics.items() if (ours := stable_name(name)) is not None}


class MetricsFile:
    """One JSON object per step. A resumed run drops the lines after the step it resumes from.

    :param folder: the run's folder.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / METRICS_FILE
        self._last: dict[str, Any] = {}
        self._start = 0  # where in the file the last line begins

    def rewind(self, step: int) -> None:
        """Forget what was written after ``step`` (and a line cut short by a kill); what comes for ``step`` joins its line."""
        kept: dict[int, dict[str, Any]] = {}
        for line in read_metrics(self.path) if self.path.exists() else []:
            if line["step"] <= step:
                kept.setdefault(line["step"], {}).update(line)
        with writing(self.path, "wb") as f:
            for line in kept.values():
                self._last, self._start = line, f.tell()
                f.write((json.dumps(line) + "\n").encode())

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Write a step's figures; those that come later for the same step (an evaluation, say) join its line.

        A figure that is not finite is written as null.
        """
        clean: dict[str, float | None] = {k: (v if math.isfinite(v) else None) for k, v in figures.items()}
        with self.path.open("ab") as f:
            end = f.seek(0, os.SEEK_END)
        if self._last.get("step") == step:
            self._last.update(clean)
        else:
            self._last, self._start = {"step": step, **clean}, end
        with self.path.open("r+b") as f:
            f.seek(self._start)
            f.write((json.dumps(self._last) + "\n").encode())
            f.truncate()
            f.flush()
            os.fsync(f.fileno())
