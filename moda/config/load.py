"""Reading configurations: ``base:`` inheritance, YAML over defaults, ``key=value`` overrides over YAML.

YAML is read strictly: what it would silently take for something else (``no`` as a key, ``12:00:00`` and ``010`` as numbers), a
key that stands twice, and aliases are refused. An override is text as it was typed; the type of its key says how to read it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moda.errors import UserError, nearest
from moda.typed import Typed, from_dict, to_dict

from .schema import RunConfig

__all__ = ["load_config", "read_config", "to_yaml"]

_TAG = "tag:yaml.org,2002:"


def _refuse(problem: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises; ``1e-3`` is a number, and a date is text."""

    yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] != f"{_TAG}timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _refuse("aliases are not supported, `base:` shares sections", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)
        data: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag in (f"{_TAG}bool", f"{_TAG}merge"):
                what = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise _refuse(f"{what} as a key is no text to YAML: write it in quotes", key)
            if key.value in data:
                raise _refuse(f"the key {key.value} stands twice", key)
            data[key.value] = self.construct_object(value, deep=True)
        return data

    def construct_number(self, node: Any) -> Any:
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            base = 60 if ":" in node.value else 8
            raise _refuse(f"{node.value} is a number of base {base} to YAML: write text in quotes", node)
        return (self.construct_yaml_int if node.tag == f"{_TAG}int" else self.construct_yaml_float)(node)


_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_number)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)


class _TypedLoader(_Loader):
    """Lists and mappings of overrides: what is not in quotes is as it was typed."""

    yaml_implicit_resolvers = {}

    def construct_text(self, node: Any) -> str:
        return Typed(node.value) if node.style is None else node.value


_TypedLoader.add_constructor(f"{_TAG}str", _TypedLoader.construct_text)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _parse(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """:raises ValueError: for what is not (strict) YAML."""
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from None


def _load_file(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path("configs")
        known = [str(folder / p.name) for p in sorted(folder.glob("*.yaml"))]
        raise UserError("config", "an existing YAML file", str(path), nearest(str(path), known) if known else None)
    path = path.resolve()
    if path in seen:
        raise UserError("base", "files that do not inherit from each other in a circle", " -> ".join(map(str, seen)))
    try:
        loaded = _parse(path.read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, ValueError) as e:
        raise UserError(str(path), "a readable YAML file", hint=str(e)[:500]) from None
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise UserError(str(path), "a YAML file of sections (key: value lines)", type(loaded).__name__)
    bases = loaded.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"base in {path}", "the name of a YAML file, or a list of names", bases)
    merged: dict[str, Any] = {}
    for name in bases:
        merged = _merge(merged, _load_file(path.parent / name, (*seen, path)))
    return _merge(merged, loaded)


#: Keys whose value is one object by name: ``{name: its options}``.
_BY_NAME = ("norm_placement", "read", "of", "source")


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge sections. ``section: null`` above drops the section below, and so does the name of another object, such as a depth
    mechanism."""
    names = below.get("mechanism"), above.get("mechanism")
    if None not in names and names[0] != names[1]:
        return dict(above)
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, Typed) and isinstance(value, Mapping):
            old = old.collection
        if isinstance(value, Typed) and isinstance(value.collection, dict) and isinstance(old, Mapping):
            value = value.collection
        merged[name] = value
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and (name not in _BY_NAME or old.keys() & value.keys())
        ):
            merged[name] = _merge(old, value)
    return merged


def _override(pair: str) -> dict[str, Any]:
    """``a.b=text`` as nested sections."""
    key, equals, text = pair.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names) or len(names) > 100:
        raise UserError("override", "key=value", pair, "for example optim.lr=1e-3")
    value = Typed(text)
    if text.startswith(("[", "{")):
        with contextlib.suppress(ValueError):  # what cannot be parsed is text
            value.collection = _parse(text, _TypedLoader)
    nested: Any = value
    for name in reversed(names):
        nested = {name: nested}
    return nested


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration file, if one is given, with its bases and overrides, as plain sections, not yet checked.

    :raises UserError: for a missing or unreadable file and malformed overrides.
    """
    merged = {} if path is None else _load_file(Path(path), ())
    for pair in overrides:
        merged = _merge(merged, _override(pair))
    return merged


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check a run's configuration.

    :param path: a YAML file; its ``base:`` names one or more files, relative to it, that it builds on.
    :param overrides: ``key=value`` pairs such as ``optim.lr=1e-3``. For a key that holds text the value is that text, whatever
        it looks like; ``null`` is null where the key may be; lists and mappings are written as in YAML (``[a, b]``).

    :raises UserError: naming the key, what is allowed and what was given.
    """
    return from_dict(RunConfig, {"name": Path(path).stem, **read_config(path, overrides)})


def to_yaml(config: Any) -> str:
    """A configuration as YAML that :func:`load_config` reads back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
