"""Run folders as a report reads them: settings, figures by step, state. Files alone: nothing of the trainer, no torch."""

from __future__ import annotations

import functools
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from moda.errors import UserError
from moda.files import METRICS_FILE, PLAN_FILE, read_json, read_metrics

__all__ = ["Array", "Run", "find_runs", "number"]

Array = npt.NDArray[np.float64]
LAYER = re.compile(r"(.*?)[/._]?(?:layer|block)s?[/._]?(\d{1,6})(.*)")
UNUSED = {"step", "perplexity", "data_loading_percent", "eta_seconds"}
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def window(count: int) -> int:
    """How many of a run's logged steps a final or smoothed loss is the mean of: its last 5 %."""
    return max(1, math.ceil(0.05 * count))


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder.

    :param name: where it is, as short as is unique in the report.
    :param settings: the configuration by dotted key, empty if it cannot be read. A section that other runs may not have has a
        value too: the name of its mechanism, or ``given``.
    :param sizes: parameters and FLOPs, as the trainer counted them.
    :param series: by metric: the steps at which it was written and its values, NaN where they were not finite.
    :param state: what a reader must know: finished or not, failed, damaged.
    :param finished: whether its last step was reached.
    """

    name: str
    settings: dict[str, Any]
    sizes: dict[str, float]
    series: dict[str, tuple[Array, Array]]
    state: str
    finished: bool

    @property
    def seed(self) -> Any:
        return self.settings.get("train.seed")

    @property
    def validation(self) -> list[str]:
        """The names of its validation sets."""
        return [k[5:-5] for k in self.series if k.startswith("eval/") and k.endswith("/loss")]

    @property
    def tasks(self) -> list[str]:
        """The names of its downstream tasks."""
        return [k[16:-9] for k in self.series if k.startswith("eval/downstream/") and k.endswith("/accuracy")]

    def of(self, metric: str) -> tuple[Array, Array]:
        """Steps and values; empty for a metric that it does not have."""
        return self.series.get(metric, (np.empty(0), np.empty(0)))

    def tokens(self, steps: Array) -> Array:
        """Tokens up to these steps: those logged, in a line between them; by the configuration where none are."""
        logged, seen = self.of("tokens")
        known = np.isfinite(seen) & (logged > 0)
        if not known.any():
            return steps * _tokens_per_step(self.settings)
        x, y = np.append(0, logged[known]), np.append(0, seen[known])
        return np.interp(steps, x, y) + np.maximum(steps - x[-1], 0) * y[-1] / x[-1]

    def flops(self, steps: Array) -> Array:
        return self.tokens(steps) * self.sizes.get("flops_per_token", math.nan)

    def seconds(self, steps: Array) -> Array:
        """Training time up to these steps: without evaluations, checkpoints and compilation, which speed leaves out."""
        logged, speed = self.of("tokens_per_second")
        speed = np.where(speed > 0, speed, np.nan)
        if not np.isfinite(speed).any():
            return np.full(len(steps), math.nan)
        ends = np.union1d(logged, steps)
        pace = np.nan_to_num(np.interp(ends, logged, speed), nan=float(np.nanmedian(speed)))
        times = np.cumsum(np.diff(self.tokens(ends), prepend=0) / pace)
        return times[np.searchsorted(ends, steps)]

    def final(self, metric: str) -> float:
        """The loss: the mean over the last :func:`window` of steps, NaN if one of them is. Another metric: its last value."""
        values = self.of(metric)[1]
        if not len(values):
            return math.nan
        return float(values[-window(len(values)) :].mean() if metric == "loss" else values[-1])

    def typical(self, metric: str) -> float:
        """The median of the finite values."""
        values = self.of(metric)[1]
        return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan

    def profiles(self) -> dict[str, tuple[Array, Array]]:
        """Metrics of single layers (``NAME/layerN``): by NAME, the layers and the means over the last steps."""
        found: dict[str, dict[int, float]] = {}
        for metric, (_, values) in self.series.items():
            m = LAYER.fullmatch(metric)
            if m and not metric.startswith("eval/"):
                name = " ".join(part for part in (m[1], m[3].strip("/._")) if part)
                found.setdefault(name, {})[int(m[2])] = float(values[-window(len(values)) :].mean())
        return {k: (np.array(sorted(v), float), np.array([v[n] for n in sorted(v)])) for k, v in found.items()}

    def smooth(self) -> tuple[Array, Array]:
        """Steps, and at each the mean loss of the :func:`window` of logged steps that it ends, finite ones alone."""
        steps, loss = self.of("loss")
        w = window(len(loss))
        sums = np.cumsum(np.concatenate((np.zeros(w), np.nan_to_num(loss))))
        counts = np.cumsum(np.concatenate((np.zeros(w), np.isfinite(loss))))
        with np.errstate(invalid="ignore"):
            return steps, (sums[w:] - sums[:-w]) / (counts[w:] - counts[:-w])


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if key:
            yield key, value.get("mechanism", "given")
        for name, child in value.items():
            yield from _flatten(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def number(value: Any) -> float:
    """A number, NaN for anything else; also for a size that no figure has and sums could not hold."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 1e100 else math.nan


def _array(values: list[Any]) -> Array:
    try:
        array = np.array(values, dtype=float).reshape(len(values))
    except (TypeError, ValueError, OverflowError):  # something that is no number is among them
        return np.array([number(v) for v in values])
    return np.where(np.abs(array) < 1e100, array, math.nan)


def _tokens_per_step(settings: Mapping[str, Any]) -> float:
    return number(settings.get("train.sequence_length")) * number(settings.get("train.global_batch_size"))


def _error(folder: Path) -> str | None:
    """The last line of the traceback that the log ends with, if it does."""
    log = folder / "train.log"
    if not log.is_file():
        return None
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 100_000))
        lines = f.read().decode("utf-8", "replace").rstrip().splitlines()
    entry = next((line for line in reversed(lines) if re.match(r"\d{4}-\d\d-\d\d ", line)), "")
    return lines[-1][:200] if "Traceback (most recent call last)" in entry else None


def _settings(folder: Path) -> dict[str, Any]:
    """The configuration by dotted key; empty if it cannot be read."""
    try:
        loaded = yaml.load((folder / "config.yaml").read_bytes(), Loader)
    except (FileNotFoundError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return dict(_flatten(loaded)) if isinstance(loaded, dict) else {}


def _sizes(folder: Path) -> dict[str, float]:
    try:
        return {name: number(value) for name, value in read_json(folder / PLAN_FILE, "plan").items()}
    except UserError:
        return {}


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Array, Array]]:
    lists: defaultdict[str, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for step, line in sorted({line["step"]: line for line in lines}.items()):
        for key, value in line.items():
            if key not in UNUSED:
                steps, values = lists[key]
                steps.append(step)
                values.append(value)
    series = {key: (_array(steps), _array(values)) for key, (steps, values) in lists.items()}
    sets = [pair for key, pair in series.items() if key.startswith("eval/") and key.endswith("/loss")]
    if len(sets) > 1:  # at the steps at which all were evaluated
        shared: Array = functools.reduce(np.intersect1d, [at for at, _ in sets])
        mean = np.mean([values[np.isin(at, shared)] for at, values in sets], axis=0)
        series = {f"eval/mean of {len(sets)} sets/loss": (shared, mean), **series}
    return series


def _read(folder: Path, name: str) -> Run:
    path = folder / METRICS_FILE
    lines = read_metrics(path) if path.is_file() else []
    damaged = len(path.read_bytes().splitlines()) - len(lines) if path.is_file() else 0
    run = Run(name, _settings(folder), _sizes(folder), _series(lines), "", False)
    last = max((line["step"] for line in lines), default=0)
    steps, tokens = (number(run.settings.get(f"train.max_{unit}")) for unit in ("steps", "tokens"))
    short = last < steps or run.tokens(np.array([number(last)]))[0] < tokens * (1 - 1e-6)  # tokens are logged rounded
    finished = (folder / "summary.json").is_file() and not short
    error = None if finished else _error(folder)
    state = "finished" if finished else f"failed: {error}" if error else "unfinished" if last else "empty"
    if last and not finished:
        end = f"{steps:,.0f}" if math.isfinite(steps) else f"{tokens:,.0f} tokens" if math.isfinite(tokens) else ""
        state += f" at step {last:,}" + (f" of {end}" if end else "")
    notes = [state]
    at, loss = run.of("loss")
    finite = np.isfinite(loss)
    if not finite.all():
        since = at[np.flatnonzero(finite)[-1] + 1] if finite.any() and not finite[-1] else at[~finite][0]
        notes.append(f"loss not finite {'at' if finite[-1] else 'since'} step {since:,.0f}")
    if not run.settings:
        notes.append("config.yaml cannot be read")
    if not run.sizes:
        notes.append(f"no {PLAN_FILE}: parameters and FLOPs unknown")
    if last and not any(key.startswith("eval/") for key in run.series):
        notes.append("no evaluations")
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} in {METRICS_FILE}")
    return replace(run, state="; ".join(notes), finished=finished)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS_FILE, "train.log"))


def _by_number(path: Path) -> list[Any]:
    """Sorts seed10 after seed2."""
    parts: list[Any] = re.split(r"(\d+(?:\.\d+)?)", path.name)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _below(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    for child in sorted(folder.iterdir(), key=_by_number):
        hidden = child.name.startswith(".") or child.is_symlink() and not _is_run(child)  # a link may lead back
        if child.is_dir() and not hidden:
            yield from _below(child)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run's or one with runs below it.

    :raises UserError: for a folder that does not exist, has no run, or cannot be read.
    """
    found: dict[Path, None] = {}
    try:
        for folder in folders:
            if not folder.is_dir():
                raise UserError("folder", "an existing folder", str(folder))
            runs = list(_below(folder.resolve()))
            if not runs:
                raise UserError("folder", f"a run (with {METRICS_FILE}) or a folder of runs", str(folder))
            found.update(dict.fromkeys(runs))
        common = Path(os.path.commonpath([p.parent for p in found]))
        return [_read(p, os.fsencode(p.relative_to(common)).decode("utf-8", "replace")) for p in found]
    except OSError as e:
        raise UserError("folder", "files that can be read", hint=str(e)) from None
