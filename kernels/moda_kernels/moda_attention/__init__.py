"""The MoDA operator: one softmax over the sequence keys of a layer and the depth keys of the same token.

Read :mod:`.naive` first: the equation in plain PyTorch. The backends are :mod:`.reference`, :mod:`.fused` and :mod:`.split`.
"""

from .api import moda_attention
from .backend import Backend, available_backends, get_backend, sequence_kernel
from .problem import Kind, Problem, make_problem
from .tensors import Deferred, DepthGradients, Gradients, Inputs, Result

__all__ = [
    "Backend", "Deferred", "DepthGradients", "Gradients", "Inputs", "Kind", "Problem", "Result", "available_backends",
    "get_backend", "make_problem", "moda_attention", "sequence_kernel",
]  # fmt: skip
