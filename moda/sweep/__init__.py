"""Ablation sweeps: a base configuration, axes that vary it, one run folder per cell."""

from .spec import Cell, Sweep, load_sweep

__all__ = ["Cell", "Sweep", "load_sweep"]
