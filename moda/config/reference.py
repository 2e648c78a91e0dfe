"""A reference of every configuration key, made from the schema: ``moda train --help-config`` and ``docs/configuration.md``.

Descriptions are the ``:param:`` lines of the sections' docstrings; types, ranges, units and defaults are the fields' own.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moda.data.prepare.options import PrepareOptions
from moda.errors import UserError, nearest
from moda.typed import field_types, kind_name, to_dict

from .schema import RunConfig

__all__ = ["Key", "keys", "page", "text"]


@dataclass(frozen=True)
class Key:
    """A configuration key.

    :param path: its name with those of its sections.
    :param kind: its type and range in words.
    :param default: as in YAML; None where it must be given.
    :param about: what it is.
    """

    path: str
    kind: str
    default: str | None
    about: str

    def __str__(self) -> str:
        default = "no default" if self.default is None else f"default: {self.default}"
        return f"{self.path}\n    {self.kind}; {default}\n    {self.about}"


def _descriptions(cls: type) -> dict[str, str]:
    """The ``:param name:`` texts of the docstrings of a class and its bases."""
    docstrings = "\n\n".join(inspect.cleandoc(c.__doc__ or "") for c in reversed(cls.__mro__[:-1]))
    parts = re.split(r"^:param (\w+):", docstrings, flags=re.MULTILINE)
    texts = (re.split(r"\n\s*\n|\n:", part)[0] for part in parts[2::2])
    return {name: " ".join(part.split()).replace("``", "`") for name, part in zip(parts[1::2], texts)}


def _types_within(kind: Any) -> Iterator[Any]:
    yield kind
    for inner in typing.get_args(kind):
        yield from _types_within(inner)


def _units(kind: Any) -> str:
    units = dict.fromkeys(getattr(inner, "unit", "") for inner in _types_within(kind))
    return "".join(f" ({unit})" for unit in units if isinstance(unit, str) and unit)


def _default(field: Any) -> str | None:
    if field.default is not dataclasses.MISSING:
        value = to_dict(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = to_dict(field.default_factory())
    else:
        return None
    words = {None: "null", True: "true", False: "false"}
    return words.get(value, str(value)) if isinstance(value, (bool, type(None))) else str(value)


def keys(cls: type, prefix: str = "", families: tuple[Any, ...] = ()) -> Iterator[Key]:
    """All keys of a dataclass of sections, in their order; of a family of objects, those of every member.

    :param families: those whose members are listed above already: a member may consist of others.
    """
    about = _descriptions(cls)
    for field in dataclasses.fields(cls):
        kind, path = field_types(cls)[field.name], f"{prefix}{field.name}"
        inner = list(_types_within(kind))
        sections = [k for k in inner if isinstance(k, type) and dataclasses.is_dataclass(k) and hasattr(k, "key")]
        family = next((k for k in inner if hasattr(k, "family")), None)
        words = kind_name(kind) + _units(kind)
        if family is not None:
            words += f": {', '.join(family.known)}"
        # a section that is there anyhow has no default of its own
        default = "see its keys" if sections == [kind] and field.default is dataclasses.MISSING else _default(field)
        yield Key(path, words, default, about[field.name])
        named = f"{path}.NAME" if typing.get_origin(kind) is dict else path
        for section in sections:
            yield from keys(section, f"{named}.", families)
        for name, member in (family.known if family is not None and family not in families else {}).items():
            # a mechanism's options stand beside its name; those of another family's member below it
            own = f"{path} (mechanism: {name})." if path == "model.depth" else f"{path}.{name}."
            yield from keys(member, own, (*families, family))


def text(command: str, key: str = "") -> str:
    """The keys of a command (``train`` or ``prepare``) that are or begin with ``key``; all by default.

    :raises UserError: naming the nearest, if there is none.
    """
    every = list(keys(PrepareOptions if command == "prepare" else RunConfig))
    plain = {re.sub(r" \(.*\)", "", k.path): k for k in every}
    chosen = [k for k in every if f"{re.sub(r' [(].*[)]', '', k.path)}.".startswith(f"{key}." if key else "")]
    if not chosen:
        raise UserError("--help-config", "a configuration key", key, nearest(key, plain))
    return "\n".join(map(str, chosen))


def page() -> str:
    """``docs/configuration.md``."""
    lines = [
        "# Every configuration key",
        "",
        "Made from the schema by `make docs`. In a terminal, `--help-config [KEY]` of the same commands shows",
        "the whole reference, or a key and those below it.",
        "",
        "A YAML file holds only what differs from the defaults; `base:` names files that it builds on, and",
        "`key=value` on the command line comes last. There a value is read by the type of its key: for a",
        "key that holds text it is the text as typed (`name=no`, `train.save_folder=runs/a #2`), `null` is",
        "null where the key may be, and lists and mappings are written as in YAML (`'data.text=[a, b]'`).",
        "In files, text that YAML would take for something else (`12:00:00`, `010`, `no` as a key) must",
        "stand in quotes. Keys that stand twice, aliases and `${...}` are refused. `NAME` is a name of your",
        "own.",
    ]
    for title, cls in (("`moda train`", RunConfig), ("`moda prepare`, to tokenize", PrepareOptions)):
        lines += ["", f"## {title}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        for k in keys(cls):
            cells = (f"`{k.path}`", k.kind, "must be given" if k.default is None else f"`{k.default}`", k.about)
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
