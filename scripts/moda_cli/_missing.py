"""What to do where a package of the project's cannot be imported."""

import sys


def missing(error: ModuleNotFoundError) -> str:
    """One line: most often the environment is not the one that ``make`` made."""
    how = "activate the project's environment (`source .venv/bin/activate`; `make install` makes it)"
    return f"error: {error.name} is not installed in this Python ({sys.executable}): {how}, or `pip install -e .`"
