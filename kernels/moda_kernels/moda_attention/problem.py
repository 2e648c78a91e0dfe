"""One attention problem: its sizes and options, checked once and handed to every backend.

Legend: B batch, T sequence length, Hq query heads, Hk key/value heads, G = Hq / Hk, D head dim, S depth slots.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch

from .tensors import Inputs

__all__ = ["Kind", "Problem", "as_run", "make_problem", "slot_tensor"]

HEAD_DIM_RANGE = (8, 256)
SLOTS = "a 1-D int32 or int64 tensor or a sequence of ints"


class Kind(NamedTuple):
    """All that a backend's abilities depend on. Backends see no more than this when they are asked what they support, so
    it is also the key of a remembered choice among them."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int
    causal: bool
    depth_chunk: int
    has_sequence: bool
    packed: bool
    one_token: bool
    sequence_kernel: str | None  # forced by MODA_SEQUENCE_KERNEL
    interpreted: bool  # Triton runs in its interpreter


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one MoDA attention call.

    :param batch: B.
    :param length: T.
    :param n_heads: Hq, heads of ``q``.
    :param n_kv_heads: Hk, heads of ``k``, ``v`` and the depth tensors.
    :param head_dim: D.
    :param n_slots: how many depth slots are read; 0 is plain attention.
    :param causal: whether token t sees the sequence tokens 0..t only. Depth has no such mask.
    :param scale: factor on every logit, ``D ** -0.5`` unless given.
    :param depth_chunk: C; token t sees the depth slots of tokens ``floor(t / C) * C .. t`` (1: its own only).
    :param has_sequence: False for depth-only attention (``k = v = None``).
    :param cu_seqlens: int32 ``[N + 1]`` document boundaries of a packed row, on the tensors' device, or None.
    :param max_seqlen: the longest document of ``cu_seqlens``, or T.
    :param slots: the slots of the depth tensors that are read, in increasing order, or None for all of them.
    """

    batch: int
    length: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_slots: int
    dtype: torch.dtype
    device: torch.device
    causal: bool = True
    scale: float = 1.0
    depth_chunk: int = 1
    has_sequence: bool = True
    cu_seqlens: torch.Tensor | None = field(default=None, compare=False)
    max_seqlen: int = 0
    slots: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        """G, the number of query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def kind(self) -> Kind:
        return Kind(
            self.device, self.dtype, self.head_dim, self.group, self.causal, self.depth_chunk, self.has_sequence,
            packed=self.cu_seqlens is not None, one_token=self.length == 1,
            sequence_kernel=os.environ.get("MODA_SEQUENCE_KERNEL") or None,
            interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        )  # fmt: skip

    @property
    def table(self) -> torch.Tensor | None:
        """``slots`` as an int32 tensor on the problem's device, or None for all slots."""
        return None if self.slots is None else slot_table(self.slots, self.device)


@functools.lru_cache(maxsize=4096)
def slot_table(slots: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Slot numbers as an int32 tensor ``[n]`` on ``device``, copied there once."""
    return torch.tensor(slots, dtype=torch.int32, device=device)


def as_run(slots: tuple[int, ...]) -> tuple[int, int] | None:
    """``(first, end)`` if increasing slot numbers leave none out, else None."""
    if not slots:
        return 0, 0
    return (slots[0], slots[-1] + 1) if slots[-1] - slots[0] + 1 == len(slots) else None


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"moda_attention: {name} must be {expected}, got {got}")


def _check_like(name: str, x: torch.Tensor | None, shape: tuple[int, ...], q: torch.Tensor) -> None:
    if x is None:
        return
    if tuple(x.shape) != shape:
        _fail(name, f"of shape {list(shape)}", f"{list(x.shape)}")
    if x.dtype != q.dtype:
        _fail(name, f"of q's dtype {q.dtype}", x.dtype)
    if x.device != q.device:
        _fail(name, f"on q's device {q.device}", x.device)


def make_problem(
    x: Inputs,
    *,
    causal: bool = True,
    scale: float | None = None,
    depth_chunk: int = 1,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    slots: torch.Tensor | tuple[int, ...] | None = None,
) -> Problem:
    """Check the arguments of :func:`moda_kernels.moda_attention` and describe the call.

    :param max_seqlen: the longest document, if ``cu_seqlens`` has been checked before: it is not read back again then.
    :param slots: a tensor is checked; a tuple must be known to be increasing and in range.

    :raises ValueError: naming the argument, what was expected and what was given.
    """
    for name, tensor in x._asdict().items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name == "q"):
            _fail(name, "a torch.Tensor", type(tensor).__name__)
    q, k, v, depth_k, depth_v, q_depth = x
    if q.ndim != 4:
        _fail("q", "of shape [B, T, Hq, D]", f"{list(q.shape)}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        _fail("q", "of dtype bfloat16, float16, float32 or float64", q.dtype)
    B, T, Hq, D = q.shape
    if min(B, T, Hq, D) < 1:
        _fail("q", "of shape [B, T, Hq, D] with no empty dimension", f"{list(q.shape)}")
    lo, hi = HEAD_DIM_RANGE
    if not lo <= D <= hi:
        _fail("q", f"of a head dim from {lo} to {hi}", D)
    for pair in (("k", "v"), ("depth_k", "depth_v")):
        for missing, other in (pair, pair[::-1]):
            if getattr(x, missing) is None and getattr(x, other) is not None:
                _fail(missing, f"given together with {other}", "None")
    if k is not None and k.ndim != 4:
        _fail("k", "of shape [B, T, Hk, D]", f"{list(k.shape)}")
    if depth_k is not None and depth_k.ndim != 5:
        _fail("depth_k", "of shape [S, B, T, Hk, D]", f"{list(depth_k.shape)}")
    if slots is not None and depth_k is None:
        _fail("slots", "None where there are no depth slots", slots)
    numbers = slots if slots is None or isinstance(slots, tuple) else _check_slots(slots, len(depth_k))  # type: ignore[arg-type]
    n_slots = len(numbers) if numbers is not None else 0 if depth_k is None else depth_k.shape[0]
    kv = k if k is not None else depth_k
    if kv is None or k is None and n_slots == 0:
        _fail("depth_k", "given with at least one slot when k and v are None (depth-only attention)", "none")
    Hk = kv.shape[-2]
    if Hk < 1 or Hq % Hk:
        _fail("q", f"of a head count that is a multiple of the key/value heads ({Hk})", Hq)
    for name in ("k", "v"):
        _check_like(name, getattr(x, name), (B, T, Hk, D), q)
    for name in ("depth_k", "depth_v"):
        _check_like(name, getattr(x, name), (0 if depth_k is None else depth_k.shape[0], B, T, Hk, D), q)
    if q_depth is not None and n_slots == 0:
        _fail("q_depth", "None where there are no depth slots", f"{list(q_depth.shape)}")
    _check_like("q_depth", q_depth, (B, T, Hq, D), q)
    if isinstance(depth_chunk, bool) or not isinstance(depth_chunk, int) or depth_chunk < 1:
        _fail("depth_chunk", "an integer >= 1", repr(depth_chunk))
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        _fail("scale", "a finite number > 0", scale)
    if cu_seqlens is None:
        max_seqlen = T
    elif max_seqlen is None:
        max_seqlen = _check_cu_seqlens(cu_seqlens, B, T, q.device)
    return Problem(
        batch=B,
        length=T,
        n_heads=Hq,
        n_kv_heads=Hk,
        head_dim=D,
        n_slots=n_slots,
        dtype=q.dtype,
        device=q.device,
        causal=bool(causal),
        scale=float(D**-0.5 if scale is None else scale),
        depth_chunk=depth_chunk,
        has_sequence=k is not None,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        slots=numbers,
    )


def slot_tensor(slots: torch.Tensor | Sequence[int] | None) -> torch.Tensor | None:
    """The ``slots`` argument of the operator as a tensor; what the numbers are is checked by :func:`make_problem`.

    :raises ValueError: for anything but a tensor and a sequence of ints.
    """
    if slots is None or isinstance(slots, torch.Tensor):
        return slots
    if not isinstance(slots, Sequence) or any(type(s) is not int for s in slots):
        _fail("slots", SLOTS, slots)
    return torch.tensor(list(slots), dtype=torch.int64, device="cpu")


def _check_slots(slots: torch.Tensor, n_slots: int) -> tuple[int, ...]:
    """Check slot numbers and return them in increasing order (synchronises a GPU once if they are on one)."""
    if slots.ndim != 1 or slots.dtype not in (torch.int32, torch.int64):
        _fail("slots", SLOTS, f"{slots.dtype} {list(slots.shape)}")
    numbers = sorted(slots.tolist())
    if numbers and not 0 <= numbers[0] <= numbers[-1] < n_slots:
        _fail("slots", f"numbers from 0 to S - 1 = {n_slots - 1}", numbers)
    if len(set(numbers)) < len(numbers):
        _fail("slots", "numbers that differ", numbers)
    return tuple(numbers)


def _check_cu_seqlens(cu_seqlens: torch.Tensor, B: int, T: int, device: torch.device) -> int:
    """Check document boundaries and return the longest document's length (synchronises a GPU once)."""
    if not isinstance(cu_seqlens, torch.Tensor):
        _fail("cu_seqlens", "an int32 tensor [N + 1]", type(cu_seqlens).__name__)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        _fail("cu_seqlens", "an int32 tensor [N + 1]", f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        _fail("cu_seqlens", f"on q's device {device}", cu_seqlens.device)
    if B != 1:
        _fail("cu_seqlens", "used with batch size 1 (one packed row)", f"batch size {B}")
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != T or min(lengths) <= 0:
        _fail("cu_seqlens", f"strictly increasing from 0 to T = {T}", bounds if len(bounds) <= 16 else "other values")
    return max(lengths)
