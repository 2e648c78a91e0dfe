"""From plain dictionaries to typed dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union

from moda.errors import UserError, nearest

__all__ = ["from_dict", "to_dict"]

T = TypeVar("T")


def _name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(m.value) for m in kind)
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    if kind in plain:
        return plain[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in args)
    if origin in (list, tuple):
        if args and args[0] not in plain:
            return f"a list, each {_name(args[0])}"
        return f"a list of {_name(args[0]).removeprefix('a ').removeprefix('an ')}s" if args else "a list"
    if origin is dict:
        return "a mapping"
    if hasattr(kind, "family"):
        return f"a {kind.family}"
    return "a section" if dataclasses.is_dataclass(kind) else str(kind)


def _convert(value: Any, kind: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if hasattr(kind, "from_plain"):
        return kind.from_plain(value, key)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1 and hasattr(options[0], "from_plain"):
            return _convert(value, options[0], key)
        sections = [a for a in options if dataclasses.is_dataclass(a)]
        if isinstance(value, Mapping) and sections:
            return _convert(value, sections[0], key)
        for option in options:
            try:
                return _convert(value, option, key)
            except UserError:
                continue
        raise UserError(key, _name(kind), _given(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(key, "a section (key: value lines)", _given(value))
        return from_dict(typing.cast(type, kind), value, key)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(key, _name(kind), _given(value))
        if origin is tuple and Ellipsis not in args:
            if len(value) != len(args):
                raise UserError(key, f"a list of {len(args)} values", list(value))
            return tuple(_convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
        return origin(_convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(key, _name(kind), _given(value))
        return {str(k): _convert(v, args[1], f"{key}.{k}") for k, v in value.items()}
    return _convert_scalar(value, kind, key)


def _given(value: Any) -> Any:
    """A value as an error shows it."""
    return "null" if value is None else value


def _convert_scalar(value: Any, kind: Any, key: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        known = [str(m.value) for m in kind]
        if not isinstance(value, str) or value not in known:
            hint = nearest(value, known) if isinstance(value, str) else None
            raise UserError(key, _name(kind), _given(value), hint)
        return kind(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():  # 400e9 is a float to YAML
            return int(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (str, Path)):
        return str(value)
    raise UserError(key, _name(kind), _given(value))


def from_dict(cls: type[T], data: Mapping[str, Any], key: str = "") -> T:
    """Build a dataclass from a dictionary, converting and checking every value.

    A class may have ``renamed``: former keys, and what they are now.

    :raises UserError: for an unknown key (naming the nearest known one), a missing one, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{key}." if key else ""
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            renamed = getattr(cls, "renamed", {}).get(name)
            hint = f"it is now {renamed}" if renamed else nearest(str(name), known)
            raise UserError(f"{prefix}{name}", "a known key", hint=hint)
        values[name] = _convert(value, hints[name], f"{prefix}{name}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{prefix}{name}", _name(hints[name]), hint="it has no default")
    return cls(**values)


def to_dict(config: Any) -> Any:
    """The plain, JSON-safe form of a configuration: :func:`from_dict` brings it back.

    Objects with ``to_plain`` and ``from_plain`` (:class:`moda.registered.Registered`) have a form of their own.
    """
    if hasattr(config, "to_plain"):
        return config.to_plain()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return str(config.value)
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    return config
