"""The MoDA operator: one softmax over the sequence keys of a layer and the depth keys of the same token."""

from .api import Backend, available_backends, get_backend, moda_attention
from .problem import Problem, make_problem

__all__ = ["Backend", "Problem", "available_backends", "get_backend", "make_problem", "moda_attention"]
