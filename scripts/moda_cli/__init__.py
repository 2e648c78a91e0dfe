"""The command line: ``moda COMMAND ...`` and the scripts beside this package."""

try:
    from ._main import main, script
except ModuleNotFoundError as e:
    from ._missing import missing

    raise SystemExit(missing(e)) from None

__all__ = ["main", "script"]
