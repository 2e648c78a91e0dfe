"""One attention problem: its sizes and options, checked once and handed to every backend.

Legend: B batch, T sequence length, Hq query heads, Hk key/value heads, G = Hq / Hk, D head dim, S depth slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

__all__ = ["Problem", "make_problem"]

HEAD_DIM_RANGE = (8, 256)


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one MoDA attention call.

    :param batch: B.
    :param length: T.
    :param n_heads: Hq, heads of ``q``.
    :param n_kv_heads: Hk, heads of ``k``, ``v`` and the depth tensors.
    :param head_dim: D.
    :param n_slots: S, depth slots that are read; 0 is plain attention.
    :param causal: whether token t sees the sequence tokens 0..t only. Depth has no such mask.
    :param scale: factor on every logit, ``D ** -0.5`` unless given.
    :param depth_chunk: C; token t sees the depth slots of tokens ``floor(t / C) * C .. t`` (1: its own only).
    :param has_sequence: False for depth-only attention (``k = v = None``).
    :param cu_seqlens: int32 ``[N + 1]`` document boundaries of a packed row, on the tensors' device, or None.
    :param max_seqlen: the longest document of ``cu_seqlens``, or T.
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

    @property
    def group(self) -> int:
        """G, the number of query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads


def _fail(name: str, expected: str, got: object) -> None:
    raise ValueError(f"moda_attention: {name} must be {expected}, got {got}")


def _check_like(name: str, x: torch.Tensor, shape: tuple[int, ...], q: torch.Tensor) -> None:
    if tuple(x.shape) != shape:
        _fail(name, f"of shape {list(shape)}", f"{list(x.shape)}")
    if x.dtype != q.dtype:
        _fail(name, f"of q's dtype {q.dtype}", x.dtype)
    if x.device != q.device:
        _fail(name, f"on q's device {q.device}", x.device)


def make_problem(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    depth_k: torch.Tensor | None = None,
    depth_v: torch.Tensor | None = None,
    *,
    q_depth: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    depth_chunk: int = 1,
    cu_seqlens: torch.Tensor | None = None,
) -> Problem:
    """Check the arguments of :func:`moda_kernels.moda_attention` and describe the call.

    :raises ValueError: naming the argument, what was expected and what was given.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("depth_k", depth_k), ("depth_v", depth_v), ("q_depth", q_depth)):
        if x is None and name != "q":
            continue
        if not isinstance(x, torch.Tensor):
            _fail(name, "a torch.Tensor", type(x).__name__)
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
    if (k is None) != (v is None):
        _fail("v" if v is None else "k", "given together with " + ("k" if v is None else "v"), "None")
    if (depth_k is None) != (depth_v is None):
        missing, other = ("depth_v", "depth_k") if depth_v is None else ("depth_k", "depth_v")
        _fail(missing, f"given together with {other}", "None")
    if k is None and (depth_k is None or depth_k.shape[0] == 0):
        _fail("depth_k", "given with at least one slot when k and v are None (depth-only attention)", "none")
    kv = k if k is not None else depth_k
    assert kv is not None
    n_slots = 0
    if depth_k is not None:
        if depth_k.ndim != 5:
            _fail("depth_k", "of shape [S, B, T, Hk, D]", f"{list(depth_k.shape)}")
        n_slots = depth_k.shape[0]
    if k is not None and k.ndim != 4:
        _fail("k", "of shape [B, T, Hk, D]", f"{list(k.shape)}")
    Hk = kv.shape[-2]
    if Hk < 1 or Hq % Hk:
        _fail("q", f"of a head count that is a multiple of the key/value heads ({Hk})", Hq)
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            _check_like(name, x, (B, T, Hk, D), q)
    for name, x in (("depth_k", depth_k), ("depth_v", depth_v)):
        if x is not None:
            _check_like(name, x, (n_slots, B, T, Hk, D), q)
    if q_depth is not None:
        if n_slots == 0:
            _fail("q_depth", "None where there are no depth slots", f"{list(q_depth.shape)}")
        _check_like("q_depth", q_depth, (B, T, Hq, D), q)
    if isinstance(depth_chunk, bool) or not isinstance(depth_chunk, int) or depth_chunk < 1:
        _fail("depth_chunk", "an integer >= 1", repr(depth_chunk))
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        _fail("scale", "a finite number > 0", scale)
    max_seqlen = T
    if cu_seqlens is not None:
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
    )


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
