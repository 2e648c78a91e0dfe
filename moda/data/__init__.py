"""Tokenizers, token files and the datasets and loaders that OLMo-core makes of them."""

from .sources import TrainingData, build_training_data
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "TrainingData", "build_training_data", "load_tokenizer"]
