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
from torch import Tensor

from .fp8 import CODES
from .tensors import Inputs

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
SLOTS = "a 1-D int32 or int64 tensor or a sequence of ints"


class Kind(NamedTuple):
    """All that decides which backends can solve a problem, and so the key of a remembered choice among them."""

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
    selects: bool = False  # a query sees its largest depth logits only
    quantised: bool = False  # depth slots are fp8
    biased: bool = False  # numbers are added to the depth logits


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one MoDA attention call."""

    batch: int  # B
    length: int  # T
    n_heads: int  # Hq
    n_kv_heads: int  # Hk
    head_dim: int  # D
    n_slots: int  # how many depth slots are read; 0 is plain attention
    dtype: torch.dtype
    device: torch.device
    causal: bool  # token t sees the sequence tokens 0..t only; depth has no such mask
    scale: float  # factor on every logit
    depth_chunk: int  # C; token t sees the depth slots of tokens floor(t / C) * C .. t (1: its own only)
    has_sequence: bool  # False for depth-only attention
    cu_seqlens: Tensor | None = field(compare=False)  # int32 [N + 1] document boundaries of a packed row
    max_seqlen: int  # the longest document, or T
    slots: tuple[int, ...] | None  # increasing numbers of the slots read; None for all of the depth tensors
    depth_top: int | None = None  # a token's query head sees its slots of the largest logits only, so many
    quantised: bool = False  # depth slots are fp8 with a scale per row
    biased: bool = False  # a number per slot is added to its logits
    partial: bool = False  # in a backward pass: output and LSE are those of a softmax with further keys, elsewhere

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
            interpreted=os.environ.get("TRITON_INTERPRET") == "1", selects=self.depth_top is not None,
            quantised=self.quantised, biased=self.biased,
        )  # fmt: skip

    @property
    def table(self) -> Tensor | None:
        """``slots`` as an int32 tensor on the problem's device, or None for all slots."""
        return None if self.slots is None else slot_table(self.slots, self.device)


@functools.lru_cache(maxsize=4096)
def slot_table(slots: tuple[int, ...], device: torch.device) -> Tensor:
    """Slot numbers as an int32 tensor ``[n]`` on ``device``, copied there once."""
    return torch.tensor(slots, dtype=torch.int32, device=device)


def as_run(slots: tuple[int, ...]) -> tuple[int, int] | None:
    """``(first, end)`` if increasing slot numbers leave none out, else None."""
    if not slots:
        return 0, 0
    return (slots[0], slots[-1] + 1) if slots[-1] - slots[0] + 1 == len(slots) else None


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"moda_attention: {name} must be {expected}, got {got}")


def make_problem(
    x: Inputs, *, causal: bool = True, scale: float | None = None, depth_chunk: int = 1, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, slots: Tensor | tuple[int, ...] | None = None, depth_top: int | None = None,
) -> Problem:  # fmt: skip
    """Check the arguments of :func:`moda_kernels.moda_attention` and describe the call.

    :param max_seqlen: the longest document, if ``cu_seqlens`` has been checked before: it is not read back again then.
    :param slots: a tensor is checked; a tuple must be known to be increasing and in range.
    :param depth_top: how many depth logits of a query stay in the softmax, the largest and what equals the least of them.

    :raises ValueError: naming the argument, what was expected and what was given.
    """
    for name, tensor in x._asdict().items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "q"):
            _fail(name, "a torch.Tensor", type(tensor).__name__)
    q, k, v, depth_k, depth_v, q_depth, scale_k, _, depth_bias = x
    for name, shape in (("q", "[B, T, Hq, D]"), ("k", "[B, T, Hk, D]"), ("depth_k", "[S, B, T, Hk, D]")):
        tensor = getattr(x, name)
        if tensor is not None and tensor.ndim != shape.count(",") + 1:
            _fail(name, f"of shape {shape}", list(tensor.shape))
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        _fail("q", "of dtype bfloat16, float16, float32 or float64", q.dtype)
    B, T, Hq, D = q.shape
    if min(B, T, Hq, D) < 1:
        _fail("q", "of shape [B, T, Hq, D] with no empty dimension", list(q.shape))
    if not MIN_HEAD_DIM <= D <= MAX_HEAD_DIM:
        _fail("q", f"of a head dim from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}", D)
    pairs = (("k", "v"), ("depth_k", "depth_v"), ("scale_k", "scale_v"), ("depth_k", "scale_k"))
    for missing, other in (*pairs, *(pair[::-1] for pair in pairs[:3])):
        if getattr(x, missing) is None and getattr(x, other) is not None:
            _fail(missing, f"given together with {other}", "None")
    if slots is not None and depth_k is None:
        _fail("slots", "None where there are no depth slots", slots)
    S = 0 if depth_k is None else depth_k.shape[0]
    numbers = slots if slots is None or isinstance(slots, tuple) else _check_slots(slots, S)
    n_slots = S if numbers is None else len(numbers)
    kv = k if k is not None else depth_k
    if kv is None or k is None and n_slots == 0:
        _fail("depth_k", "given with at least one slot when k and v are None (depth-only attention)", "none")
    Hk = kv.shape[-2]
    if Hk < 1 or Hq % Hk:
        _fail("q", f"of a head count that is a multiple of the key/value heads ({Hk})", Hq)
    if q_depth is not None and n_slots == 0:
        _fail("q_depth", "None where there are no depth slots", list(q_depth.shape))
    shapes = [(B, T, Hk, D)] * 2 + [(S, B, T, Hk, D)] * 2 + [(B, T, Hq, D)] + [(S, B, T, Hk)] * 2 + [(n_slots,)]
    dtypes = dict(depth_bias=torch.promote_types(q.dtype, torch.float32))
    if scale_k is not None:
        dtypes |= dict(depth_k=CODES, depth_v=CODES, scale_k=torch.float32, scale_v=torch.float32)
    for (name, tensor), expected in zip(list(x._asdict().items())[1:], shapes):
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected:
            _fail(name, f"of shape {list(expected)}", list(tensor.shape))
        if tensor.dtype != dtypes.get(name, q.dtype):
            _fail(name, f"of dtype {dtypes[name]}" if name in dtypes else f"of q's dtype {q.dtype}", tensor.dtype)
        if tensor.device != q.device:
            _fail(name, f"on q's device {q.device}", tensor.device)
    if type(depth_chunk) is not int or depth_chunk < 1:
        _fail("depth_chunk", "an integer >= 1", repr(depth_chunk))
    if depth_top is not None and (type(depth_top) is not int or depth_top < 1):
        _fail("depth_top", "an integer >= 1, or None", repr(depth_top))
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        _fail("scale", "a finite number > 0", scale)
    if cu_seqlens is None or max_seqlen is None:
        max_seqlen = T if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, B, T, q.device)
    return Problem(
        B, T, Hq, Hk, D, n_slots, q.dtype, q.device, bool(causal), float(D**-0.5 if scale is None else scale), depth_chunk,
        k is not None, cu_seqlens, max_seqlen, numbers, depth_top, scale_k is not None, depth_bias is not None,
    )  # fmt: skip


def row_bounds(p: Problem, depth: bool) -> tuple[Tensor | None, Tensor | None]:
    """int32 ``[T]`` each: the first token that a token may see, and the one after the last.

    For the sequence these are its document's, None without ``cu_seqlens``. With ``depth`` they are its chunk's (chunks restart at
    documents), None unless ``depth_chunk > 1``. A chunk's slots are seen exactly as a document's keys are, under a causal mask.
    """
    if depth and p.depth_chunk == 1 or not depth and p.cu_seqlens is None:
        return None, None
    token = torch.arange(p.length, device=p.device, dtype=torch.int32)
    start, end = torch.zeros_like(token), torch.full_like(token, p.length)
    if p.cu_seqlens is not None:
        index = torch.searchsorted(p.cu_seqlens, token, right=True, out_int32=True)
        start, end = p.cu_seqlens[index - 1], p.cu_seqlens[index]
    if depth:
        first = start + (token - start) // p.depth_chunk * p.depth_chunk
        start, end = first, torch.minimum(first + p.depth_chunk, end)
    return start, end


def slot_tensor(slots: Tensor | Sequence[int] | None) -> Tensor | None:
    """The ``slots`` argument as a tensor, or ValueError; what the numbers are is checked by :func:`make_problem`."""
    if slots is None or isinstance(slots, Tensor):
        return slots
    if not isinstance(slots, Sequence) or any(type(s) is not int for s in slots):
        _fail("slots", SLOTS, slots)
    return torch.tensor(list(slots), dtype=torch.int64, device="cpu")


def _check_slots(slots: Tensor, n_slots: int) -> tuple[int, ...]:
    """Check slot numbers and return them in increasing order (synchronises a GPU once if they are on one)."""
    if slots.ndim != 1 or slots.dtype not in (torch.int32, torch.int64):
        _fail("slots", SLOTS, f"{slots.dtype} {list(slots.shape)}")
    numbers = sorted(slots.tolist())
    if numbers and not 0 <= numbers[0] <= numbers[-1] < n_slots:
        _fail("slots", f"numbers from 0 to S - 1 = {n_slots - 1}", numbers)
    if len(set(numbers)) < len(numbers):
        _fail("slots", "numbers that differ", numbers)
    return tuple(numbers)


def _check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int, device: torch.device) -> int:
    """Check document boundaries and return the longest document's length (synchronises a GPU once)."""
    if not isinstance(cu_seqlens, Tensor):
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
