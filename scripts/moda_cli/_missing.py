"""What to do where a package of the project's cannot be imported."""

import sys

_EXTRAS = {
    "hf": ("transformers", "safetensors"),
    "data": ("datatrove", "loguru", "multiprocess", "pyarrow", "regex", "zstandard"),
    "wandb": ("wandb",),
}


def missing(error: ModuleNotFoundError) -> str:
    """One line: most often the environment is not the one that ``make`` made."""
    how = "activate the project's environment (`source .venv/bin/activate`; `make install` makes it)"
    root = (error.name or "").split(".")[0]
    extra = next((f"'.[{name}]'" for name, packages in _EXTRAS.items() if root in packages), ".")
    return f"error: {root} is not installed in this Python ({sys.executable}): {how}, or pip install -e {extra}"
