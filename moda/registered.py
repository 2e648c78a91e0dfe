"""Families of small objects that a configuration names: norm placements, slot policies, depth mechanisms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from moda.errors import UserError, nearest
from moda.typed import from_dict, to_dict

__all__ = ["Registered"]

M = TypeVar("M", bound="Registered")


class Registered:
    """Base of a family. Members are dataclasses with a ``name``; the family's registry module lists them once.

    In YAML a member without options is its name, one with a single option ``{name: value}``, and one with several
    ``{name: {option: value, ...}}``.
    """

    name: ClassVar[str]
    #: What the family is called in errors.
    family: ClassVar[str]
    #: The members by name, filled by :meth:`register`.
    known: ClassVar[dict[str, type[Any]]]

    @classmethod
    def register(cls, *members: type[Any]) -> None:
        """Make members known under their names."""
        cls.known = {member.name: member for member in members}

    @classmethod
    def member(cls: type[M], name: Any, key: str) -> type[M]:
        """The member called ``name``.

        :raises UserError: naming the nearest known one.
        """
        if not isinstance(name, str) or name not in cls.known:
            hint = nearest(name, cls.known) if isinstance(name, str) else None
            raise UserError(
                key, f"a {cls.family}: one of {', '.join(cls.known)}", "null" if name is None else name, hint
            )
        return cls.known[name]

    @classmethod
    def from_plain(cls: type[M], value: Any, key: str) -> M:
        """The member that a configuration's value describes.

        :param key: the value's key, for errors.

        :raises UserError: for an unknown member, or options that it does not have.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return from_dict(cls.member(value, key), {}, f"{key}.{value}")
        if len(value) != 1:
            raise UserError(key, f"the name of one {cls.family}, or one name: value", dict(value))
        [(name, options)] = value.items()
        member = cls.member(name, key)
        if not isinstance(options, Mapping):
            fields = dataclasses.fields(member)  # type: ignore[arg-type]
            if not fields:
                raise UserError(key, f"{name} without a value", options)
            options = {fields[0].name: options}
        return from_dict(member, options, f"{key}.{name}")

    def to_plain(self) -> Any:
        """What :meth:`from_plain` takes."""
        values = {f.name: to_dict(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        if not values:
            return self.name
        return {self.name: values if len(values) > 1 else next(iter(values.values()))}
