"""Runs that differ in their seed alone are one variant: its means, its differences to the baseline, its speedup."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moda.errors import UserError, nearest

from .runs import Run

__all__ = [
    "Estimate", "Variant", "choose_baseline", "describe", "differences", "differing", "shown_value", "speedup", "variants",
]  # fmt: skip

#: Settings that change nothing in what a run computes.
IGNORED = re.compile(r"name$|description$|train\.save_folder$|data\.work_dir$|(logging|checkpoint)(\.|$)")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    :param margin: half of its 95 % interval (Student's t), NaN for a single seed.
    """

    mean: float
    margin: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Of the finite values: ``n`` says how many those were."""
        x = np.array([v for v in values if math.isfinite(v)])
        if len(x) < 2:
            return cls(float(x[0]) if len(x) else math.nan, math.nan, len(x))
        return cls(float(x.mean()), _t(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x)), len(x))


@functools.cache
def _t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, from its density."""
    x = np.linspace(0, 13, 130_001)
    density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    density *= math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    below = np.concatenate(([0], np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))))
    return float(np.interp(0.475, below, x))


@dataclass(frozen=True, eq=False)
class Variant:
    """Runs with the same settings but for the seed."""

    label: str
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def final(self, metric: str) -> Estimate:
        """Over its finished runs."""
        return Estimate.of(run.final(metric) for run in self.finished)


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs differ. One that a run does not have is no difference: its section says so."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not IGNORED.match(key))
    return [k for k in keys if len({repr(run.settings[k]) for run in runs if k in run.settings}) > 1]


def describe(run: Run, keys: Sequence[str]) -> str:
    """``lr=0.001, ffn=True``: a run's values of these settings."""
    last = [k.rpartition(".")[2] for k in keys]
    shown = [name if last.count(name) == 1 else key for key, name in zip(keys, last)]
    return ", ".join(
        f"{name}={shown_value(run.settings[key])}" for key, name in zip(keys, shown) if key in run.settings
    )


def shown_value(value: Any) -> str:
    """A setting as a configuration file has it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def variants(runs: Sequence[Run], without: Sequence[str] = ("train.seed",)) -> list[Variant]:
    """Runs grouped by all settings in which they differ but ``without``.

    A label is the runs' name less its seed where that tells variants apart, else what differs.
    """
    keys = [k for k in differing(runs) if k not in without]
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        same = tuple(repr(run.settings.get(k, "")) for k in keys) if run.settings else run.name
        groups.setdefault(same, []).append(run)
    names = [{re.sub(r"[-_., /]*(train\.)?seed[-_=]?\d+", "", run.name) for run in group} for group in groups.values()]
    if all(len(n) == 1 and "" not in n for n in names) and len(set().union(*names)) == len(names):
        return [Variant(name, group) for (name,), group in zip(names, groups.values())]
    whole = str(runs[0].settings.get("name", "run"))
    labels = [describe(group[0], keys) or whole for group in groups.values()]
    return [
        Variant(label if labels.count(label) == 1 else f"{label} ({group[0].name})", group)
        for label, group in zip(labels, groups.values())
    ]


def choose_baseline(all_variants: Sequence[Variant], name: str | None) -> Variant:
    """The variant called ``name`` or with a run of that name; by default the first without a depth mechanism, or the first.

    :raises UserError: if there is none of that name.
    """
    if name is None:
        plain = (v for v in all_variants if v.runs[0].settings.get("model.depth", "") is None)
        return next(plain, all_variants[0])
    for v in all_variants:
        if name == v.label or name in [run.name for run in v.runs]:
            return v
    raise UserError(
        "--baseline", "a variant or run of this report", name, nearest(name, [v.label for v in all_variants])
    )


def differences(variant: Variant, baseline: Variant, metric: str) -> Estimate:
    """Variant minus baseline, over pairs of finished runs with the same seed."""
    ours, theirs = ({run.seed: run.final(metric) for run in v.finished} for v in (variant, baseline))
    return Estimate.of(ours[seed] - theirs[seed] for seed in ours if seed is not None and seed in theirs)


def _reached(run: Run, loss: float) -> float | None:
    """The step from which on a run's smoothed loss stays at or below ``loss``, between logged steps by interpolation."""
    steps, smooth = run.smooth()
    above = np.flatnonzero(~(smooth <= loss))
    if not len(above):
        return float(steps[0]) if len(steps) else None
    i = int(above[-1])
    if i + 1 == len(steps):
        return None
    part = (smooth[i] - loss) / (smooth[i] - smooth[i + 1]) if np.isfinite(smooth[i]) else 1.0
    return float(steps[i] + part * (steps[i + 1] - steps[i]))


def speedup(variant: Variant, baseline: Variant) -> tuple[dict[str, Estimate], int]:
    """How many times less a variant needs to reach the baseline's final loss, in ``tokens``, ``flops`` and ``seconds``.

    Each finished run is compared with the baseline's of its seed, or else with the baseline's first.

    :returns: the ratios, and how many of the runs reached it.
    """
    costs: dict[str, Callable[[Run, np.ndarray], np.ndarray]] = {
        "tokens": Run.tokens, "flops": Run.flops, "seconds": Run.seconds
    }  # fmt: skip
    ratios: dict[str, list[float]] = {name: [] for name in costs}
    pairs = {run.seed: run for run in reversed(baseline.finished) if math.isfinite(run.final("loss"))}
    reached = 0
    for run in variant.finished if pairs else []:
        base = pairs.get(run.seed) or next(reversed(pairs.values()))
        step = _reached(run, base.final("loss"))
        if step is not None:
            reached += 1
            for name, cost in costs.items():
                whole = cost(base, base.of("loss")[0][-1:])[0]
                with np.errstate(all="ignore"):  # an unknown cost is NaN, and left out
                    ratios[name].append(float(whole / cost(run, np.array([step]))[0]))
    return {name: Estimate.of(values) for name, values in ratios.items()}, reached
