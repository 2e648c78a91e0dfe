"""Reading configuration files: ``base:`` inheritance, YAML over defaults, dot-list overrides over YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moda.errors import UserError, nearest
from moda.typed import from_dict

from .schema import RunConfig

__all__ = ["load_config", "read_yaml"]


def _load_file(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        known = [str(folder / p.name) for p in sorted(folder.glob("*.yaml"))]
        raise UserError("config", "an existing YAML file", str(path), nearest(str(path), known) if known else None)
    path = path.resolve()
    if path in seen:
        raise UserError("base", "files that do not inherit from each other in a circle", " -> ".join(map(str, seen)))
    try:
        loaded = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as e:
        raise UserError(str(path), "a readable YAML file", " ".join(str(e).split())) from None
    if not isinstance(loaded, DictConfig):
        raise UserError(str(path), "a YAML file of sections (key: value lines)", type(loaded).__name__)
    base = loaded.pop("base", None)
    bases: list[str] = [] if base is None else ([base] if isinstance(base, str) else list(base))
    merged = OmegaConf.create({})
    for name in bases:
        merged = cast(DictConfig, OmegaConf.merge(merged, _load_file(path.parent / str(name), (*seen, path))))
    return _merge(merged, loaded)


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Merge sections. ``section: null`` above drops the section below, and so does the name of another depth mechanism."""
    key = "model.depth.mechanism"
    names = [OmegaConf.select(config, key) for config in (below, above)]
    if None not in names and names[0] != names[1]:
        below = below.copy()
        OmegaConf.update(below, "model.depth", None)
    return cast(DictConfig, OmegaConf.merge(below, above))


def _overrides(pairs: Sequence[str]) -> DictConfig:
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        if not equals or not key.strip():
            raise UserError("override", "key=value", pair, "for example optim.lr=1e-3")
    try:
        return OmegaConf.from_dotlist(list(pairs))
    except (OmegaConfBaseException, YAMLError) as e:
        raise UserError("override", "key=value with a YAML value", " ".join(str(e).split())) from None


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Mapping[str, Any]:
    """A configuration file with its bases and overrides, as a plain dictionary, not yet checked.

    :raises UserError: for a missing or unreadable file and malformed overrides.
    """
    merged = _load_file(Path(path), ())
    try:
        merged = _merge(merged, _overrides(overrides))
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as e:
        raise UserError(str(path), "values that can be merged and resolved", " ".join(str(e).split())) from None
    return cast(Mapping[str, Any], plain)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check a run's configuration.

    :param path: a YAML file; its ``base:`` names one or more files, relative to it, that it builds on.
    :param overrides: ``key=value`` pairs such as ``optim.lr=1e-3``.

    :raises UserError: naming the key, what is allowed and what was given.
    """
    data = dict(read_yaml(path, overrides))
    data.setdefault("name", Path(path).stem)
    return from_dict(RunConfig, data)
