"""What a backend of the operator can do, and how one is chosen."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch
from torch import Tensor

from .problem import MAX_HEAD_DIM, MIN_HEAD_DIM, Kind, Problem, make_problem
from .tensors import DepthTarget, Gradients, Inputs, Pending, Result

log = logging.getLogger(__name__)

BACKENDS = ("reference", "fused", "split")


class Backend:
    """One way to compute the operator. A backend is a module of this package with an instance called ``backend``."""

    name: str
    #: Whether ``backward`` can leave its depth gradients in a :class:`Deferred` place made by ``pending``.
    defers = False

    def unsupported(self, kind: Kind) -> str | None:
        """Why this backend cannot solve problems of this kind, naming the argument, or None if it can."""
        raise NotImplementedError

    def forward(self, p: Problem, x: Inputs) -> Result:
        raise NotImplementedError

    def backward(
        self, p: Problem, grad_out: Tensor, grad_lse: Tensor | None, x: Inputs, saved: Result, depth: DepthTarget
    ) -> Gradients:
        """Gradients of q, k, v and q_depth.

        :param depth: where the gradients of the depth slots go; None where none are read.
        """
        raise NotImplementedError

    def pending(self, layers: int, slots: int, q: Tensor, n_kv_heads: int) -> Pending:
        """Room for the depth gradients of up to ``layers`` layers like the one of ``q``, over ``slots`` slots."""
        raise NotImplementedError

    def add_depth(self, p: Problem, x: Inputs, sequence: Result) -> Tensor:
        """The output ``[B, T, Hq, D]`` of one softmax over the keys of ``sequence`` and the depth slots of ``x``.

        :param p: a depth-only problem. :param sequence: attention over the sequence keys alone.
        """
        out, lse = sequence
        deep = self.forward(p, x)
        weight = torch.sigmoid(deep.lse - lse).mT[..., None]
        return (out + weight * (deep.out - out)).to(out.dtype)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _load(name: str) -> Backend:
    return importlib.import_module(f".{name}", __package__).backend


def available_backends() -> list[str]:
    """Names of the backends whose requirements this machine has (a CUDA device is not looked for)."""
    return list(BACKENDS if _has_triton() else BACKENDS[:1])


def get_backend(name: str, kind: Kind) -> Backend:
    """The backend called ``name``, or the one that :func:`choose_backend` picks for ``"auto"``.

    :raises ValueError: for an unknown name, a backend this machine does not have, or one that cannot solve such problems.
    """
    if name == "auto":
        return choose_backend(kind)
    if name not in BACKENDS:
        raise ValueError(f"moda_attention: backend must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    if name != "reference" and not _has_triton():
        raise ValueError(
            f"moda_attention: backend {name!r} cannot run here: Triton is not installed (pip install triton)"
        )
    backend = _load(name)
    if (reason := backend.unsupported(kind)) is not None:
        raise ValueError(f"moda_attention: backend {name!r} cannot run this: {reason}")
    return backend


def sequence_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Name of the flash attention that ``split`` runs on a device for plain causal sequences, or None where it has none."""
    if not (_has_triton() and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM):
        return None
    q = torch.empty(1, 2, 1, head_dim, dtype=dtype, device=device)
    kernel, _ = importlib.import_module(".split.sequence", __package__).select(make_problem(Inputs(q, q, q)).kind)
    return None if kernel is None else kernel.name


@functools.cache
def choose_backend(kind: Kind) -> Backend:
    """The fastest backend that can solve problems of this kind; the choice is logged once."""
    name = "reference"
    if kind.device.type == "cuda" and _has_triton():
        # split first: the faster of the two in nearly every row of the committed benchmark results.
        name = next((n for n in ("split", "fused") if _load(n).unsupported(kind) is None), name)
    log.info(
        "moda_attention: backend auto chose %r for %s %s, head dim %d, group size %d, causal=%s, depth_chunk=%d",
        name, kind.device, str(kind.dtype).removeprefix("torch."), kind.head_dim, kind.group, kind.causal, kind.depth_chunk,
    )  # fmt: skip
    return _load(name)
