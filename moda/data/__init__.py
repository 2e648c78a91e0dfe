"""Tokenizers, token files and the datasets and loaders that OLMo-core makes of them.

Names are imported on use: the worker processes of a preparation need neither torch nor OLMo-core.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sources import TrainingData, build_training_data
    from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "TrainingData", "build_training_data", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".tokenizer" if "okenizer" in name else ".sources", __name__), name)
