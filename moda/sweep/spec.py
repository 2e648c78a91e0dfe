"""The file of a sweep, and the runs that it comes to.

A sweep varies a configuration along axes. Its runs are the product of all axes and seeds, without what is excluded::

    config: ../moda_demo.yaml                # relative to the file
    override: {train.max_steps: 200}         # for every run
    axes:
      - model.norm_placement: [pre, post]    # a key and its values
      - {optim.lr: [1e-3, 2e-3], optim.warmup_steps: [20, 40]}      # several keys together
      - depth:                               # a name, and what each of its values sets
          none: {model.depth: null}
          moda: {model.depth: {mechanism: moda}}
    seeds: [0, 1, 2]
    exclude: [{model.norm_placement: post, depth: none}]
    match: {by: params, to: {depth: none}}   # see moda.sweep.match

A value of a named axis may also set ``config``, another file instead of the sweep's.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from moda.config import RunConfig, load_config, read_config
from moda.config.names import own_folder
from moda.errors import UserError, nearest
from moda.typed import convert, from_dict

#: Keys that a sweep sets itself.
_OWN = ("name", "train.save_folder", "train.seed")
#: Names that no run can have: folders of the sweep.
_TAKEN = ("logs", "slurm")


class By(str, Enum):
    """What is made equal."""

    params = "params"
    flops = "flops"
    time = "time"


@dataclass
class MatchSection:
    """``match``: make the runs equal in something, by changing something else.

    :param by: parameters; training FLOPs (per token, or in all where tokens are changed); or time.
    :param to: the run that sets the measure: its values on some axes. Each run is compared with the one that has these and
        otherwise its own values.
    :param change: ``model.ffn_hidden_size``, ``model.n_layers`` or ``train.max_tokens`` (always for time).
    :param measured: for time, the folder of a sweep with the same runs, whose tokens/s are taken.
    """

    by: By
    to: dict[str, Any]
    change: str | None = None
    measured: str | None = None

    def __post_init__(self) -> None:
        allowed = {
            By.params: ["model.ffn_hidden_size", "model.n_layers"],
            By.flops: ["model.ffn_hidden_size", "model.n_layers", "train.max_tokens"],
            By.time: ["train.max_tokens"],
        }[self.by]
        self.change = self.change or allowed[0]
        if self.change not in allowed:
            raise UserError("match.change", f"one of {', '.join(allowed)} for {self.by.value}", self.change)
        if (self.by == By.time) != (self.measured is not None):
            raise UserError(
                "match.measured", "the folder of a measured sweep for time, and null otherwise", self.measured
            )


@dataclass
class SweepSection:
    """The keys of a sweep's file; see this module.

    :param folder: where the runs go; ``runs/sweeps/<name of the file>`` if null.
    :param data: how to get the data, for example a ``moda prepare`` command: shown where they are missing.
    """

    config: str
    axes: list[dict[str, Any]]
    override: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] | None = None
    exclude: list[dict[str, Any]] = field(default_factory=list)
    match: MatchSection | None = None
    folder: str | None = None
    data: str | None = None
    description: str | None = None


@dataclass(frozen=True)
class Axis:
    """What varies: by label, the keys that each value sets."""

    name: str
    values: dict[str, dict[str, Any]]

    @property
    def short(self) -> str:
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Cell:
    """One run.

    :param labels: its value on each axis.
    :param file: its configuration file.
    :param keys: what is set over it.
    :param overrides: the same as a command line says it, the user's own included.
    :param changed: what ``match`` did, in words.
    """

    name: str
    labels: dict[str, str]
    seed: int | None
    file: Path
    keys: dict[str, Any]
    overrides: tuple[str, ...]
    config: RunConfig
    changed: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.config.log_folder)

    def with_key(self, key: str, value: Any, changed: str) -> "Cell":
        """The run with one more key set.

        :raises UserError: naming the run, where that cannot be.
        """
        overrides = (*self.overrides, text_of(key, value))
        config = _load(self.name, self.file, overrides)
        return replace(self, keys={**self.keys, key: value}, overrides=overrides, config=config, changed=changed)


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, read and expanded. :param cells: its runs, in the order of the axes."""

    name: str
    folder: Path
    section: SweepSection
    axes: list[Axis]
    cells: list[Cell]


def text_of(key: str, value: Any) -> str:
    """An override as it is typed."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _label(key: str, value: Any) -> str:
    """A short name for a value of a key: text as it is, anything else after the key's last word."""
    short = key.rsplit(".", 1)[-1]
    text = value if isinstance(value, str) else f"{short}{value:g}" if isinstance(value, float) else f"{short}{value}"
    return re.sub(r"[^\w.+]+", "-", text).strip("-") or short


def _axis(section: Mapping[str, Any], number: int) -> Axis:
    where = f"axes[{number}]"
    if len(section) == 1 and isinstance(next(iter(section.values())), Mapping):
        [(name, named)] = section.items()
        for label, keys in named.items():
            if keys is not None and not isinstance(keys, Mapping):
                raise UserError(f"{where}.{name}.{label}", "the keys that it sets (key: value lines), or null", keys)
        labels = [_label(name, str(label)) for label in named]
        rows = [dict(keys or {}) for keys in named.values()]
    else:
        lengths = {len(v) if isinstance(v, list) else 0 for v in section.values()}
        if len(lengths) != 1 or lengths == {0}:
            raise UserError(where, "keys with lists of values, all of one length", dict(section))
        name = " and ".join(section)
        rows = [dict(zip(section, row)) for row in zip(*section.values())]
        labels = ["-".join(_label(k, v) for k, v in row.items()) for row in rows]
    values = dict(zip(labels, rows))
    if len(values) != len(rows):
        raise UserError(where, "values with names that differ", list(values), "give them names of their own")
    if not values:
        raise UserError(where, "at least one value")
    return Axis(name, values)


def _leaves(keys: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Dotted keys, those in sections too."""
    for key, value in keys.items():
        value = getattr(value, "collection", None) or value  # of what was typed
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _check_keys(section: SweepSection, axes: Sequence[Axis], typed: Sequence[str]) -> None:
    """Refuse keys that are set in two places, and those that a sweep sets itself. What is typed may replace ``override``."""
    owners = {f"axis {axis.name}": {k for keys in axis.values.values() for k in _leaves(keys)} for axis in axes}
    given = {"override": set(_leaves(section.override)), "the command line": set(_leaves(read_config(None, typed)))}
    for owner, keys in given.items():
        _check_owners({owner: keys, **owners})


def _check_owners(owners: Mapping[str, set[str]]) -> None:
    seen: dict[str, str] = {}
    for owner, keys in owners.items():
        for key in sorted(keys):
            if key in _OWN:
                raise UserError(owner, "keys that a sweep does not set itself", key, "seeds: [0, 1] varies the seed")
            if key in seen:
                raise UserError(key, "to be set once", f"{seen[key]} and {owner}")
            seen[key] = owner


def _matches(labels: Mapping[str, str], wanted: Mapping[str, Any], axes: Sequence[Axis], key: str) -> bool:
    """Whether a run has the values (one, or a list of them) that ``wanted`` names for some axes."""
    by_name = {axis.name: axis for axis in axes}
    for name, given in wanted.items():
        if name not in by_name:
            raise UserError(f"{key}.{name}", "an axis of this sweep", hint=nearest(name, by_name))
        options = [_label(name, v) for v in (given if isinstance(given, list) else [given])]
        for option in options:
            if option not in by_name[name].values:
                raise UserError(f"{key}.{name}", f"one of {', '.join(by_name[name].values)}", option)
        if labels[name] not in options:
            return False
    return True


def _load(name: str, file: Path, overrides: Sequence[str]) -> RunConfig:
    try:
        return load_config(file, overrides)
    except UserError as e:
        raise UserError(f"run {name}: {e.key}", e.expected, e.got, e.hint) from None


def _cells(
    sweep: str, folder: Path, section: SweepSection, axes: Sequence[Axis], base: Path, typed: Sequence[str]
) -> Iterator[Cell]:
    seeds: list[int | None] = [None] if section.seeds is None else list(section.seeds)
    ambiguous = [label for label, n in Counter(label for axis in axes for label in axis.values).items() if n > 1]
    for labels in itertools.product(*(axis.values for axis in axes)):
        chosen = {axis.name: label for axis, label in zip(axes, labels)}
        if any(_matches(chosen, excluded, axes, f"exclude[{i}]") for i, excluded in enumerate(section.exclude)):
            continue
        keys: dict[str, Any] = dict(section.override)
        for axis, label in zip(axes, labels):
            keys.update(axis.values[label])
        file = base / convert(keys.pop("config", section.config), str, "config")
        for seed in seeds:
            parts = [f"{axis.short}-{label}" if label in ambiguous else label for axis, label in zip(axes, labels)]
            name = "-".join([*parts, *([] if seed is None else [f"seed{seed}"])])
            own: dict[str, Any] = {"name": name, "train.save_folder": str(folder / name)}
            own.update({} if seed is None else {"train.seed": seed})
            keys.setdefault("logging.wandb.group", sweep)
            overrides = (*(text_of(k, v) for k, v in {**keys, **own}.items()), *typed)
            yield Cell(name, chosen, seed, file, {**keys, **own}, overrides, _load(name, file, overrides))


def load_sweep(path: str | Path, typed: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file and build the configuration of every run.

    :param typed: ``key=value`` pairs for every run, over everything else.

    :raises UserError: for keys that are unknown or set twice, and runs that cannot be built, by name.
    """
    from .match import equalise

    path = Path(path)
    section = from_dict(SweepSection, read_config(path))
    axes = [_axis(axis, number) for number, axis in enumerate(section.axes)]
    names = [axis.name for axis in axes]
    if not axes or len(set(names)) != len(names):
        raise UserError("axes", "at least one axis, with names that differ", ", ".join(names) or "none")
    if section.seeds is not None and (not section.seeds or len(set(section.seeds)) != len(section.seeds)):
        raise UserError("seeds", "a list of different numbers, or null", section.seeds)
    _check_keys(section, axes, typed)
    folder = Path(section.folder or f"runs/sweeps/{path.stem}")
    own_folder("folder", section.folder or str(folder))
    cells = list(_cells(path.stem, folder, section, axes, path.parent, typed))
    if not cells:
        raise UserError("exclude", "at least one run that is left", "all of them excluded")
    for name, n in Counter([*_TAKEN, *(cell.name for cell in cells)]).items():
        if n > 1:
            raise UserError("axes", f"runs with names that differ from each other and from {', '.join(_TAKEN)}", name)
    if section.match is not None:
        reference = section.match.to
        if not reference or any(isinstance(value, list) for value in reference.values()):
            raise UserError("match.to", "an axis and one of its values, or several of both", reference)
        _matches(cells[0].labels, reference, axes, "match.to")
        wanted = {name: _label(name, value) for name, value in reference.items()}
        cells = equalise(cells, section.match, wanted)
    return Sweep(path.stem, folder, section, axes, cells)
