"""Small files, read and written in one way: whole or not at all, and with one clear error for what cannot be read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from moda.errors import UserError

__all__ = [
    "LOCK", "METRICS_FILE", "PLAN_FILE", "PLOTS", "check_new", "check_writable", "locked", "read_json", "read_metrics",
    "write_json", "write_text", "writing",
]  # fmt: skip

log = logging.getLogger(__name__)

LOCK = ".lock"
#: Of a run folder: the figures of each step, and what the model comes to.
METRICS_FILE, PLAN_FILE = "metrics.jsonl", "plan.json"
PLOTS = (".png", ".svg", ".pdf")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(folder: Path, key: str, what: str) -> Iterator[None]:
    """Keep a second process out of a folder, which is made if need be. The lock goes with the process, however that ends.

    It is a record lock on the folder's file ``.lock``, which names the owner: the kernel, or the server of an NFS, drops it when
    the process or its host is gone. Unlike flock's, it is not inherited by child processes.

    :param key: what an error is about.
    :param what: what the owner is (``run``).

    :raises UserError: naming the owner, or if the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = held.enter_context((folder / LOCK).open("a+"))
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno in (errno.EACCES, errno.EAGAIN):
                    handle.seek(0)
                    owner = handle.read().strip() or "another process"
                    raise UserError(key, f"no other {what} in {folder}", owner, "wait for it to end") from None
                if e.errno not in _NO_LOCKS:
                    raise
                log.warning("%s is on a file system without locks: start no other %s in it", folder, what)
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T %z')}\n")
            handle.flush()
        except OSError as e:
            raise UserError(key, f"a folder that can be written ({folder})", hint=str(e)) from None
        yield


def check_writable(key: str, path: Path, endings: Sequence[str] = (), folder: bool = False) -> None:
    """Refuse a file that could not be written, before anything is computed for it. Nothing is made.

    :param endings: of which the name must have one.
    :param folder: a folder is to be made, rather than a file.

    :raises UserError: naming ``key``.
    """
    if endings and path.suffix.lower() not in endings:
        raise UserError(key, f"a file name that ends in {', '.join(endings)}", str(path))
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if folder and path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        place = path.absolute().parent
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as e:
        raise UserError(key, "a place that can be written", str(path), e.strerror) from None


def check_new(out: Path) -> None:
    """Refuse a command's folder ``OUT`` that could not be made, or has something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("OUT", "a new or empty folder", str(out))
    check_writable("OUT", out, folder=True)


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
    """The lines of a metrics file, without those that were cut short or damaged. What is no finite number is None."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        lines = json.loads(f"[{','.join(texts)}]")  # all at once takes half the time
    except (ValueError, RecursionError):
        lines = [_line(text) for text in texts]
    steps = ((line, line.get("step")) for line in lines if isinstance(line, dict))
    return [{k: _figure(v) for k, v in line.items()} for line, n in steps if type(n) is int and 0 <= n < 2**63]


def _figure(value: Any) -> int | float | None:
    return value if isinstance(value, (int, float)) and abs(value) < 1e100 else None


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
