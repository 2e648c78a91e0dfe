"""From any text to token files, on datatrove: readers, de-duplication, tokenizing, shards and a manifest.

``prepare`` and its options are imported on use, so that worker processes stay light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import PrepareOptions, load_options
    from .run import Preparation, prepare

__all__ = ["PrepareOptions", "Preparation", "load_options", "prepare"]


def __getattr__(name: str) -> Any:
    if name in ("PrepareOptions", "load_options"):
        from . import options as module
    elif name in ("Preparation", "prepare"):
        try:
            from . import run as module  # type: ignore[no-redef]
        except ModuleNotFoundError as e:
            if (e.name or "").split(".")[0] not in ("datatrove", "loguru", "multiprocess", "orjson", "zstandard"):
                raise
            from moda.errors import UserError

            raise UserError(
                "prepare_data", "the extra 'data' to be installed (pip install -e '.[data]')", str(e)
            ) from None
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
