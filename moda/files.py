"""Small files, read and written in one way: whole or not at all, and with one clear error for what cannot be read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moda.errors import UserError

__all__ = ["METRICS_FILE", "PLAN_FILE", "read_json", "read_metrics", "write_json", "write_text", "writing"]

#: Of a run folder: the figures of each step, and what the model comes to.
METRICS_FILE, PLAN_FILE = "metrics.jsonl", "plan.json"


@contextlib.contextmanager
def writing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name, on disk, once the block is left without an error; until then the old one stays.

    :param mode: ``w`` for UTF-8 text, ``wb`` for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with scratch.open(mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with writing(path) as f:
        f.write(text)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(data, indent=1))


def _is_deep(data: Any, limit: int = 100) -> bool:
    """Whether JSON data is nested more than ``limit`` times: what reads it further may be recursive."""
    level = [data]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return any(isinstance(node, (dict, list)) for node in level)


def read_json(path: Path, key: str, kind: type = dict) -> Any:
    """The contents of a JSON file that may come from anywhere.

    :param key: what an error is about (``checkpoint``, ``results``).
    :param kind: the type that the outermost value must have.

    :raises UserError: for a file that is missing, unreadable, no JSON, nested too deeply, or of another type.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if _is_deep(data):
            raise RecursionError
    except (OSError, ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else str(e).split("\n")[0][:200]
        raise UserError(key, f"a readable JSON file {path}", hint=reason) from None
    if not isinstance(data, kind):
        expected = "an object" if kind is dict else "a list" if kind is list else kind.__name__
        raise UserError(key, f"{expected} in {path}", type(data).__name__)
    return data


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without those that were cut short or damaged."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        lines = json.loads(f"[{','.join(texts)}]")  # all at once takes half the time
    except (ValueError, RecursionError):
        lines = [_line(text) for text in texts]
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
