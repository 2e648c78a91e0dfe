"""From any text to token files, on datatrove: de-duplication, tokenizing, shards and a manifest.

``prepare`` and its options are imported on use, so that worker processes stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moda.errors import UserError

if TYPE_CHECKING:
    from .options import PrepareOptions, load_options
    from .run import Preparation, prepare

__all__ = ["PrepareOptions", "Preparation", "load_options", "prepare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(".options" if "ptions" in name else ".run", __name__), name)
    except ModuleNotFoundError as e:
        if (e.name or "moda").startswith("moda"):
            raise
        expected = "the extra 'data' to be installed (pip install -e '.[data]' in a clone)"
        raise UserError("prepare_data", expected, str(e)) from None
