"""Small text, tokenized at the first start of a run: documents in, token files and a manifest out.

For corpora of many gigabytes there is ``scripts/prepare_data.py``; this is for a folder of text or the demo.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moda.errors import UserError

from .tokenizer import Tokenizer

__all__ = ["PYTHON_STDLIB", "Document", "PreparedText", "prepare_text", "read_documents"]

log = logging.getLogger(__name__)

PYTHON_STDLIB = "python-stdlib"
FORMAT = 1  # of what is written; part of the folder's name
TEXT_SUFFIXES = {
    ".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts",
    ".html", ".xml", ".css", ".sh", ".json", ".yaml", ".yml", ".toml", ".jsonl",
}  # fmt: skip
_BATCH = 64  # documents given to the tokenizer at a time


@dataclass(frozen=True)
class Document:
    """One document: its label (the source it belongs to), a path that is the same on every machine, and its text."""

    label: str
    path: str
    text: str


@dataclass(frozen=True)
class PreparedText:
    """Token files made of text, by label; ``manifest`` says what they hold."""

    train: dict[str, Path]
    validation: dict[str, Path]
    manifest: dict[str, Any]


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped & set(relative.parts) and not relative.parts[0].startswith("config-"):
            files.append((relative.as_posix(), path))
    return files


def _expand(source: str) -> tuple[str, list[tuple[str, Path]]]:
    """A source's label and its files as (relative path, path), in a stable order."""
    if source == PYTHON_STDLIB:
        return source, _stdlib_files()
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_SUFFIXES)
        return path.resolve().name, [(p.relative_to(path).as_posix(), p) for p in found]
    if path.is_file():
        return path.stem, [(path.name, path)]
    matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    label = path.parent.name if path.parent.name and "*" not in path.parent.name else "text"
    return label, [(p.name, p) for p in matches]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError("data.text", f"UTF-8 text in {path}", hint=f"byte {e.start}: {e.reason}") from None
    except OSError as e:
        raise UserError("data.text", f"a readable file {path}", hint=str(e)) from None


def read_documents(sources: Sequence[str]) -> Iterator[Document]:
    """The documents of files, folders, globs or the Python library, in a stable order.

    :raises UserError: for sources that do not exist or cannot be read.
    """
    for source in sources:
        label, files = _expand(source)
        if not files:
            raise UserError("data.text", f"{PYTHON_STDLIB!r}, or files, folders and globs that exist", source)
        for relative, path in files:
            if path.suffix.lower() == ".jsonl":
                yield from _jsonl_documents(label, relative, path)
                continue
            try:
                text = _read_text(path)
            except UserError:
                if source != PYTHON_STDLIB:
                    raise
                continue  # a few library files are deliberately not UTF-8
            if text.strip():
                yield Document(label, relative, text)


def _jsonl_documents(label: str, relative: str, path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                "data.text", f"a JSON object with a 'text' field in {path}, line {number}", line[:60]
            ) from None
        if not isinstance(text, str):
            raise UserError("data.text", f"a string in the field 'text' of {path}, line {number}", text)
        if text.strip():
            yield Document(label, f"{relative}#{number}", text)


def _share(document: Document) -> float:
    """A number from 0 to 1 that depends on the document's relative path alone."""
    digest = hashlib.sha256(document.path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents; both have at least one."""
    if len(documents) == 1:
        only = documents[0]
        cut = max(1, int(len(only.text) * (1 - fraction)))
        log.warning("one document only: the last %.0f %% of its characters are held out for validation", 100 * fraction)
        return [Document(only.label, only.path, only.text[:cut])], [Document(only.label, only.path, only.text[cut:])]
    ordered = sorted(documents, key=_share)
    count = min(max(1, sum(_share(d) < fraction for d in ordered)), len(documents) - 1)
    held_out = {id(d) for d in ordered[:count]}
    return [d for d in documents if id(d) not in held_out], [d for d in documents if id(d) in held_out]


def _write_tokens(documents: list[Document], folder: Path, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """One file of tokens a label, every document ended by eos; what each holds."""
    encoder = tokenizer.load()
    encoder.encode_special_tokens = True  # text that looks like a special token is text: only this ends documents
    dtype = np.dtype(np.uint16 if tokenizer.config.vocab_size <= 2**16 else np.uint32)
    folder.mkdir(parents=True)
    found: dict[str, dict[str, Any]] = {}
    for label in sorted({d.label for d in documents}):
        chosen = [d for d in documents if d.label == label]
        tokens = 0
        with open(folder / f"{label}.npy", "wb") as f:
            for i in range(0, len(chosen), _BATCH):
                encoded = encoder.encode_batch([d.text for d in chosen[i : i + _BATCH]], add_special_tokens=False)
                for e in encoded:
                    ids = np.asarray(e.ids + [tokenizer.config.eos_token_id])
                    if ids.max() >= tokenizer.config.vocab_size:
                        raise UserError(
                            "data.tokenizer.vocab_size", f"more than the largest token id {ids.max()}",
                            tokenizer.config.vocab_size,
                        )  # fmt: skip
                    f.write(ids.astype(dtype).tobytes())
                    tokens += len(ids)
            f.flush()
            os.fsync(f.fileno())
        found[label] = {"documents": len(chosen), "tokens": tokens, "bytes": sum(len(d.text.encode()) for d in chosen)}
    return found


def prepare_text(
    text: str | Sequence[str], tokenizer: Tokenizer, *, validation_fraction: float, work_dir: str | Path
) -> PreparedText:
    """Tokenize text once; the next call with the same text, tokenizer and split finds the result.

    Every document ends with the tokenizer's eos. Documents whose hashed relative path falls below ``validation_fraction`` are
    held out. The files are flat uint16 or uint32, as OLMo-core memory-maps them; they appear complete or not at all.

    :raises UserError: for missing or unreadable text.
    """
    sources = [text] if isinstance(text, str) else list(text)
    documents = list(read_documents(sources))
    if not documents:
        raise UserError("data.text", "at least one document that is not empty", ", ".join(sources))
    key = hashlib.sha256(json.dumps([FORMAT, tokenizer.describe(), validation_fraction]).encode())
    for d in documents:
        key.update(json.dumps([d.label, d.path, d.text]).encode())
    folder = Path(work_dir) / f"text-{key.hexdigest()[:16]}"
    if not (folder / "manifest.json").is_file():
        _build(documents, folder, tokenizer, validation_fraction)
    manifest = json.loads((folder / "manifest.json").read_text())
    train = {label: folder / "train" / f"{label}.npy" for label in manifest["train"]}
    validation = {label: folder / "validation" / f"{label}.npy" for label in manifest["validation"]}
    return PreparedText(train, validation, manifest)


def _build(documents: list[Document], folder: Path, tokenizer: Tokenizer, fraction: float) -> None:
    log.info("tokenizing %d documents with %s ...", len(documents), tokenizer.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        train, validation = _split(documents, fraction)
        manifest = {
            "tokenizer": tokenizer.describe(),
            "dtype": "uint16" if tokenizer.config.vocab_size <= 2**16 else "uint32",
            "train": _write_tokens(train, scratch / "train", tokenizer),
            "validation": _write_tokens(validation, scratch / "validation", tokenizer),
        }
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        try:
            scratch.replace(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():  # otherwise another process made the same files first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
