"""Writing small corpora and comparing what was made of them."""

from __future__ import annotations

import json
from pathlib import Path


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """A record a line, with the text in the field ``text``."""
    path.write_text("".join(json.dumps({"text": d, "n": i}) + "\n" for i, d in enumerate(documents)), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
