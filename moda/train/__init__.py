"""Training: OLMo-core's trainer, built from a configuration."""

from .run import plan, train

__all__ = ["plan", "train"]
