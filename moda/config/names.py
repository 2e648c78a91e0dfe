"""Checks of names and folders that a run writes."""

from __future__ import annotations

import os
from pathlib import Path

from moda.errors import UserError


def folder_name(key: str, name: str) -> None:
    """Refuse what cannot be the name of one visible folder."""
    good = name.isprintable() and name == name.strip() and name[:1] not in ("", ".", "~") and not {"/", "\\"} & {*name}
    if not good or len(name.encode()) > 200:
        raise UserError(key, "a name for a folder: at most 200 bytes, no slash, not beginning with . or ~", repr(name))


def own_folder(key: str, folder: str, remote: bool = False) -> None:
    """Refuse the current directory, the home directory and what they lie in, and URLs that cannot be written.

    :param remote: whether it may be a URL.
    """
    if "://" in folder:
        if not remote or folder.split("://")[0] not in ("gs", "r2", "s3", "weka"):
            either = ", or a URL that begins with gs, r2, s3 or weka" if remote else ""
            raise UserError(key, f"a folder{either}", folder)
        return
    if not folder.strip() or not folder.isprintable() or folder.startswith("~"):
        raise UserError(key, "a folder, not beginning with ~ (which only a shell expands)", repr(folder))
    try:
        place = Path(folder).resolve()
        around = [here for here in (Path.cwd(), Path(os.path.expanduser("~"))) if here.resolve().is_relative_to(place)]
    except (OSError, RuntimeError) as e:  # links in a circle
        raise UserError(key, "a folder", folder, str(e)) from None
    if around:
        raise UserError(key, f"a folder of its own, not {around[0]} nor one that it lies in", folder)
