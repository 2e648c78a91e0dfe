"""Tokenizers, token files and the datasets and loaders that OLMo-core makes of them.

Names are imported on use: the worker processes of a preparation need neither torch nor OLMo-core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sources import TrainingData, build_training_data
    from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "TrainingData", "build_training_data", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in ("TrainingData", "build_training_data"):
        from . import sources as module
    elif name in ("Tokenizer", "load_tokenizer"):
        from . import tokenizer as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
