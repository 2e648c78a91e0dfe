"""Pretraining of language models with Mixture-of-Depths Attention (MoDA, arXiv 2603.15619)."""

__version__ = "0.1.0"
