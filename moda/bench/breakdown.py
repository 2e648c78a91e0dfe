"""What a training step's time goes into, by the names of the kernels that ran, from a profile.

A moment in which several kernels run is counted once, for the first of their kinds in :data:`KINDS`. Communication comes last:
its time is what no computation hides. Kinds are told by names alone, so the products of the loss's head are ``matmul``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

#: Kind -> pattern of kernel names; the first that matches counts. A compiled kernel's name lists the operators it fuses, of which
#: only a softmax over the vocabulary tells anything.
_PATTERNS = {
    "communication": r"nccl",
    "depth_forward": r"^_depth_forward_kernel",
    "depth_backward": r"^_depth_backward_kernel",
    "depth_flush": r"^_flush(_few)?_kernel",
    "loss": r"^_row$|^triton_.*(log_softmax|nll_loss|logsumexp|cross_entropy)|cunn_SoftMax|nll_loss",
    "norms_copies": r"^triton_(poi|red|per|for)_|multi_tensor_apply.*Copy",
    "optimizer": r"multi_tensor_apply|lpnorm|FusedAdam",
    "attention": r"flash|fmha|sdpa|attention|cudnn::fusion|^(forward|rows|queries|keys)_kernel",
    "matmul": r"nvjet|gemm|gemv|cutlass|xmma|splitK|cublas|^triton_(tem|mm)_",
    "eager": r"^(void )?at::|elementwise|[Mm]emcpy|[Mm]emset|split_with_sizes|chunk_cat|index|embedding|DeviceRadix|DeviceUnique",
}

#: In the order in which they claim a moment. ``norms_copies`` has what the compiler made, and eager copies and reductions.
KINDS = (
    "matmul", "attention", "depth_forward", "depth_backward", "depth_flush", "loss", "optimizer", "norms_copies", "other",
    "communication",
)  # fmt: skip


class Kernel(NamedTuple):
    """One launch. :param start: microseconds, as ``end``."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The kind of a kernel, one of :data:`KINDS`."""
    found = next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, name)), "other")
    return "norms_copies" if found == "eager" else found


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of a union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def breakdown(kernels: list[Kernel], steps: int, step_ms: float) -> dict[str, float]:
    """Milliseconds per step by kind, which together with ``gaps`` come to ``step_ms``.

    :param kernels: of ``steps`` profiled steps on one GPU.
    :param step_ms: a step's time without the profiler, which itself makes gaps longer.

    :returns: also ``communication_all``: what ran of it, hidden or not.
    """
    by_kind: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for kernel in kernels:
        by_kind[kind_of(kernel.name)].append((kernel.start, kernel.end))
    out, seen, before = {}, [], 0.0
    for kind, intervals in by_kind.items():
        seen += intervals
        now = _covered(seen)
        out[kind], before = (now - before) / 1e3 / steps, now
    out["gaps"] = max(0.0, step_ms - before / 1e3 / steps)
    out["communication_all"] = _covered(by_kind["communication"]) / 1e3 / steps
    return out


def unknown(kernels: list[Kernel], most: int = 5) -> list[str]:
    """Names of the kernels that take longest among those of no known kind."""
    taken: dict[str, float] = {}
    for kernel in kernels:
        if kind_of(kernel.name) == "other":
            taken[kernel.name] = taken.get(kernel.name, 0.0) + kernel.end - kernel.start
    return sorted(taken, key=lambda name: -taken[name])[:most]


def kernels_of(profile: Any) -> list[Kernel]:
    """The launches that a ``torch.profiler.profile`` saw on its GPU."""
    from torch.autograd import DeviceType

    return [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
