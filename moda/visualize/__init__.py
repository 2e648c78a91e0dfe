"""What a model attends to, and what its layers hold: measured on a text, drawn, and written as CSV."""

from .measure import Look, look

__all__ = ["Look", "look"]
