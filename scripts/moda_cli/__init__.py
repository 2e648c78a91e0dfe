"""The command line: ``moda COMMAND ...`` and the scripts beside this package."""

from ._main import main, script

__all__ = ["main", "script"]
