"""Tile choices that outlive a process: a file of this user's, and one that may come with the package.

Both are JSON: card -> kernel -> problem -> tile. Cards are told by what decides (compute capability; in the user's file also the
number of multiprocessors and Triton's version), never by name. ``MODA_TILE_CACHE`` is the user's file, by default
``~/.cache/moda/tiles.json``; empty, there is none. A file that cannot be read or written is said once and done without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .tiles import Tile

log = logging.getLogger(__name__)

#: What comes with the package, if anything does.
MEASURED = Path(__file__).parent / "measured_tiles.json"


def user_file() -> Path | None:
    """Where this user's choices are kept."""
    named = os.environ.get("MODA_TILE_CACHE")
    if named == "":
        return None
    named = named or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/moda/tiles.json"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:  # a container may run as a user without a home
        _say(Path(named), f"cannot be found ({error})")
        return None


def cards(device: torch.device) -> tuple[str, str]:
    """A device as the package's file and as the user's knows it."""
    import triton

    p = torch.cuda.get_device_properties(device)
    kind = f"sm{p.major}{p.minor}"
    return kind, f"{kind}, {p.multi_processor_count} multiprocessors, Triton {triton.__version__}"


@functools.cache
def _say(path: Path, problem: str) -> None:
    log.warning("tile cache %s: %s; MODA_TILE_CACHE names another file, or none if it is empty", path, problem)


def _read(path: Path) -> dict[str, Any]:
    """A file's content; nothing if there is none, or none that can be used."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, ValueError) as error:
        _say(path, f"cannot be read ({error})")
        return {}
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Put a file in its place, whole. :raises OSError: where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as f:
            f.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def known(device: torch.device, kernel: str, problem: str) -> list[dict[str, Any]]:
    """Tiles that were chosen for a problem before, as dictionaries: this user's first, then the package's."""
    kind, card = cards(device)
    found = []
    for path, name in ((user_file(), card), (MEASURED, kind)):
        content: Any = {} if path is None else _read(path)
        for key in (name, kernel, problem):
            content = content.get(key) if isinstance(content, dict) else None
        if isinstance(content, dict):
            found.append(content)
    return found


def remember(device: torch.device, kernel: str, problem: str, tile: Tile) -> None:
    """Keep a choice in the user's file. Of processes that write at once the last one wins."""
    if (path := user_file()) is None:
        return
    content = _read(path)
    section: Any = content
    for key in (cards(device)[1], kernel):
        section[key] = section[key] if isinstance(section.get(key), dict) else {}
        section = section[key]
    section[problem] = {k: v for k, v in dataclasses.asdict(tile).items() if v is not None}
    try:
        write(path, content)
    except OSError as error:
        _say(path, f"cannot be written ({error.strerror})")
