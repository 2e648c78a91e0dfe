"""From plain dictionaries to typed dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union

from moda.errors import UserError, nearest
from moda.ranges import Range

__all__ = ["Section", "Typed", "convert", "field_types", "from_dict", "kind_name", "to_dict"]

T = TypeVar("T")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Typed(str):
    """The value of an override as it was typed. Only the type of its key says how to read it.

    :ivar collection: the list or mapping that it is, if it looks like one.
    """

    collection: Any = None


class Section:
    """Base of a configuration's sections: dataclasses whose values are converted and checked however they are made."""

    #: Where the section stands in a configuration.
    key: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in field_types(type(self)).items():  # type: ignore[arg-type]
            key = f"{self.key}.{name}" if self.key else name
            object.__setattr__(self, name, convert(getattr(self, name), kind, key))


@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, with their ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _options(kind: Any) -> tuple[Any, ...]:
    """The types that a type allows."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _bare(kind: Any) -> tuple[Any, Range | None]:
    """A type without its range, and the range."""
    return typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind, None)


@functools.cache
def kind_name(kind: Any) -> str:
    """A type in words."""
    if len(_options(kind)) > 1:
        return " or ".join(kind_name(a) for a in _options(kind))
    kind, allowed = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(m.value) for m in kind)
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    if kind in plain:
        return plain[kind] if allowed is None else f"{plain[kind]} {allowed}"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        item, allowed = _bare(args[0])
        if item not in plain:
            return f"a list, each {kind_name(item)}"
        words = f"a list of {kind_name(item).removeprefix('a ').removeprefix('an ')}s"
        return words if allowed is None else f"{words} {allowed}"
    if origin is dict:
        return "a mapping"
    if hasattr(kind, "family"):
        return f"a {kind.family}"
    return "a section" if dataclasses.is_dataclass(kind) else "a value" if kind is Any else str(kind)


def _read(typed: Typed, kind: Any) -> Any:
    """What was typed, as the type of its key reads it."""
    kinds = {_bare(option)[0] for option in _options(kind)}
    if typed == "null" and kinds & {type(None), Any}:
        return None
    scalars = {
        k for k in kinds if k in (str, int, float, bool, type(None)) or isinstance(k, type) and issubclass(k, Enum)
    }
    if typed.collection is not None and kinds - scalars:
        return typed.collection
    if str in kinds:
        return str(typed)
    word = typed.strip().lower()
    if (bool in kinds and word in _WORDS) or (Any in kinds and word in ("true", "false")):
        return _WORDS[word]
    for number in (int, float) if kinds & {int, float, Any} else ():
        try:
            if math.isfinite(value := number(typed)):
                return value
        except (ValueError, OverflowError):
            continue
    return str(typed)


def convert(value: Any, kind: Any, key: str, expected: str | None = None) -> Any:
    """A value as its type has it.

    :param expected: what is allowed in all, where the type is one of several.

    :raises UserError: for a value of another type or range.
    """
    if isinstance(value, Typed):
        value = _read(value, kind)
    expected = expected or kind_name(kind)
    if len(_options(kind)) > 1:
        return _convert_union(value, _options(kind), key, expected)
    kind, allowed = _bare(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _convert_any(value, key)
    if hasattr(kind, "from_plain"):
        return kind.from_plain(value, key)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        if not isinstance(value, Mapping):
            raise UserError(key, "a section (key: value lines)", _given(value))
        return from_dict(typing.cast(type, kind), value, key)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(key, expected, _given(value))
        if origin is tuple and Ellipsis not in args:
            if len(value) != len(args):
                raise UserError(key, f"a list of {len(args)} values", list(value))
            return tuple(convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
        return origin(convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(key, expected, _given(value))
        return {_text(str(k), key): convert(v, args[1], f"{key}.{k}") for k, v in value.items()}
    converted = _convert_scalar(value, kind, key, expected)
    if allowed is not None and converted not in allowed:
        raise UserError(key, expected, converted)
    return converted


def _convert_union(value: Any, options: tuple[Any, ...], key: str, expected: str) -> Any:
    if value is None and type(None) in options:
        return None
    left = [a for a in options if a is not type(None)]
    if isinstance(value, Mapping):
        fitting = [a for a in left if dataclasses.is_dataclass(a) or typing.get_origin(a) is dict]
    elif isinstance(value, (list, tuple)):
        fitting = [a for a in left if typing.get_origin(a) in (list, tuple)]
    else:
        fitting = [a for a in left if a is str and isinstance(value, str)]
    for option in fitting or (left if len(left) == 1 else []):  # its error says more than that none of them fits
        return convert(value, option, key, expected)
    for option in left:
        try:
            return convert(value, option, key)
        except UserError:
            continue
    raise UserError(key, expected, _given(value))


def _convert_any(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {_text(str(k), key): convert(v, Any, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [convert(v, Any, f"{key}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    kind = next((k for k in (str, int, float) if isinstance(value, k)), None)
    if kind is None:
        raise UserError(key, "text, a number, true, false, null, a list or a mapping", value)
    return _convert_scalar(value, kind, key, kind_name(kind))


def _given(value: Any) -> Any:
    """A value as an error shows it."""
    return "null" if value is None else value


def _text(value: str, key: str) -> str:
    """Text that can be a name, a path, a line of a file."""
    reasons = {
        "it is empty": not value.strip(),
        "nothing is interpolated: write the value itself": "${" in value,
        "??? stands for a missing value": value == "???",
        "it has a NUL character": "\0" in value,
        "it is no valid Unicode": any("\ud800" <= c <= "\udfff" for c in value),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(key, "a string", repr(value) if value.strip() == "" else value, reason)
    return value


def _convert_scalar(value: Any, kind: Any, key: str, expected: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        if isinstance(value, kind):
            return value
        known = [str(m.value) for m in kind]
        if not isinstance(value, str) or value not in known:
            hint = nearest(value, known) if isinstance(value, str) else None
            raise UserError(key, expected, _given(value), hint)
        return kind(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and not isinstance(value, bool):
        if isinstance(value, float) and value.is_integer():  # 400e9 is a float to YAML
            value = int(value)
        if isinstance(value, int):
            if abs(value) >= 2**63:
                raise UserError(key, "an integer of 64 bits", value)
            return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < 1e300:  # NaN too
            raise UserError(key, "a finite number", value)
        return float(value)
    if kind is str and isinstance(value, (str, Path)):
        return _text(str(value), key)
    raise UserError(key, expected, _given(value))


def from_dict(cls: type[T], data: Mapping[str, Any], key: str = "") -> T:
    """Build a dataclass from a dictionary, converting and checking every value.

    A class may have ``renamed``: former keys, and what they are now.

    :raises UserError: for an unknown key (naming the nearest known one), a missing one, or a value of another type or range.
    """
    kinds = field_types(cls)  # type: ignore[arg-type]
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{key}." if key else ""
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            renamed = getattr(cls, "renamed", {}).get(name)
            hint = f"it is now {renamed}" if renamed else nearest(str(name), known)
            raise UserError(f"{prefix}{name}", "a known key", hint=hint)
        values[name] = convert(value, kinds[name], f"{prefix}{name}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{prefix}{name}", kind_name(kinds[name]), hint="it has no default")
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
