"""Which commit a figure is of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str:
    """The commit of this checkout, ``-dirty`` if files differ from it; ``MODA_COMMIT`` where git does not come along."""
    given = os.environ.get("MODA_COMMIT", "")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
