"""Reading text: the one way in which training, preparation and evaluation find files and their documents.

* Newlines, CRLF included, stay as they are in the file. A byte order mark at its beginning is no text.
* JSON lines end at ``\\n`` only.
* A folder gives every file of a known format below it, compressed or not. Hidden files and folders (a name that begins with a
  dot) and files of other formats are passed over, which is logged once.
* The format of a file is recognized by its name and its first bytes (:func:`moda.data.formats.detect`).
"""

import glob
import hashlib
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moda.errors import UserError

from .formats import AUTO, FORMATS, Piece, Records, TextFormat, detect

log = logging.getLogger(__name__)

PYTHON_STDLIB = "python-stdlib"
_NO_TEXT = {"__pycache__", "node_modules"}  # folders that are passed over like hidden ones
_NOT_OURS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Document:
    """A document.

    :param label: the source it belongs to.
    :param id: its place, the same on every machine: a relative path and, for example, a line number.
    :param text: its text.
    """

    label: str
    id: str
    text: str


@dataclass(frozen=True)
class TextFile:
    """A file of text and its format; ``name`` is relative to the folder that was given."""

    path: str
    name: str
    format: TextFormat


def expand(pattern: str) -> list[str]:
    """The files and folders of a path or glob, in order; a path that exists is never taken for a glob."""
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    folder = next((p for p in Path(pattern).parents if os.path.isdir(p)), Path())  # its name may have [ ] too
    rest = str(Path(pattern).relative_to(folder))
    return sorted(str(folder / match) for match in glob.glob(rest, root_dir=folder, recursive=True))


def _in_folder(key: str, folder: str, format: str, field: str) -> list[TextFile]:
    files: list[TextFile] = []
    skipped: Counter[str] = Counter()
    for here, folders, names in os.walk(folder):
        hidden = {name for name in folders if name.startswith(".") or name in _NO_TEXT}
        folders[:] = sorted(set(folders) - hidden)
        skipped["hidden folders and caches"] += len(hidden)
        for name in sorted(names):
            path = os.path.join(here, name)
            if name.startswith("."):
                skipped["hidden files"] += 1
            elif not os.path.isfile(path) or (known := detect(path, format, field)) is None:
                skipped[Path(name).suffix or "files without suffix"] += 1
            else:
                files.append(TextFile(path, os.path.relpath(path, folder).replace(os.sep, "/"), known))
    if skipped := +skipped:
        counts = ", ".join(f"{n:,} {kind}" for kind, n in skipped.most_common(12))
        log.info("%s: %d files of %s are read; passed over: %s", key, len(files), folder, counts)
    return files


def find_files(key: str, pattern: str, format: str = AUTO, field: str = "text") -> list[TextFile]:
    """The files of a path, folder or glob, in a stable order.

    :param key: what an error is about.
    :param format: the name of a format, or ``auto``.
    :param field: the text field of records.

    :raises UserError: for a path that gives none.
    """
    files: list[TextFile] = []
    matches = expand(pattern)
    for path in matches:
        if os.path.isdir(path):
            files += _in_folder(key, path, format, field)
        else:
            known = detect(path, field=field) or FORMATS["text"] if format == AUTO else FORMATS[format]
            files.append(TextFile(path, os.path.basename(path), known))
    if not files:
        formats = ", ".join(f.name for f in FORMATS.values() if f.in_files) if format == AUTO else format
        expected = f"files of a known format ({formats})" if matches else "files, folders or globs that exist"
        raise UserError(key, expected, pattern)
    return files


def _stdlib_files() -> list[TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [(p.relative_to(root), p) for p in sorted(root.rglob("*.py"))]
    return [
        TextFile(str(path), relative.as_posix(), FORMATS["text"])
        for relative, path in paths
        if not _NOT_OURS & set(relative.parts) and not relative.parts[0].startswith("config-")
    ]


def _label(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name or "text"
    if path.is_file():
        return path.stem
    return path.parent.name if path.parent.name and "*" not in path.parent.name else "text"


def read_documents(sources: Sequence[str], key: str = "data.text") -> Iterator[Document]:
    """The documents of files, folders, globs or the Python library, in a stable order; those without text are left out.

    :param key: what an error is about.

    :raises UserError: for sources that do not exist or cannot be read, naming file and line.
    """
    for source in sources:
        records = Records(key)
        if source == PYTHON_STDLIB:
            label, files = source, _stdlib_files()
            records.bad_input = "skip"  # a few of its files are deliberately not UTF-8
        else:
            label, files = _label(source), find_files(key, source)
        for file in files:
            for text, place in file.format.documents(Piece(file.format.name, file.path), records):
                yield Document(label, file.name + place.removeprefix(file.path), text)


def holdout_share(text: str) -> float:
    """A number from 0 to 1 that depends on a document's text alone: the first 8 bytes of its SHA-256, as a fraction."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: equal documents are on the same side, in every corpus and on every machine."""
    return holdout_share(text) < fraction
