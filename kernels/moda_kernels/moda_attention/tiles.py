"""Steps on one tile that the Triton kernels of this package share, and the choice among named tile shapes.

A *row* is one query head of one token. Tiles of rows are ``[BLOCK_M, BLOCK_DIM]`` with the head dim padded to a power of
two; what lies outside a tensor reads as zero. Scores stay in raw units (q . k) and are turned into exponents of two by
one fused multiply-add, ``exp2(s * scale * log2(e) - m)``, so q is never rounded a second time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    "LOG2_E",
    "Tile",
    "TileChooser",
    "depth_columns",
    "key_range",
    "load_row_values",
    "load_tile",
    "natural_lse",
    "next_power_of_two",
    "probabilities",
    "score_gradients",
    "sees",
    "softmax_step",
    "tma_descriptor",
    "tma_ready",
    "tma_rows",
]

log = logging.getLogger(__name__)

LOG2_E = 1.4426950408889634


# --- steps inside a kernel -------------------------------------------------------------------------------------------


@triton.jit
def load_tile(
    x, batch, head, row, stride_b, stride_h, stride_t, n_rows, dim,
    ROWS: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``[ROWS, DIM]``: rows ``row..`` of one head of ``x``, a tensor descriptor over (B, H, T, D) or a pointer."""
    if TMA:
        tile = x.load([batch, head, row, 0]).reshape(ROWS, DIM)
    else:
        r = row + tl.arange(0, ROWS)
        d = tl.arange(0, DIM)
        base = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        at = base + r.to(tl.int64)[:, None] * stride_t + d[None, :]
        tile = tl.load(at, mask=(r < n_rows)[:, None] & (d < dim)[None, :], other=0.0)
    return tile


@triton.jit
def load_row_values(x, index, row, row_stride, length, ROWS: tl.constexpr, TMA: tl.constexpr):
    """``[ROWS]`` values of line ``index`` of ``x`` ``[N, row_stride]`` (a descriptor or a pointer), zero past the end."""
    if TMA:
        values = x.load([index, row]).reshape(ROWS)
    else:
        r = row + tl.arange(0, ROWS)
        values = tl.load(x + tl.full([], index, tl.int64) * row_stride + r, mask=r < length, other=0.0)
    return values


@triton.jit
def key_range(
    seq_start, seq_end, first, last, length,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Sequence keys that the tokens ``first..last`` see: blocks from ``lo`` to ``hi``.

    Every token sees every key of the blocks from ``inner`` to ``plain``; those before (with documents) and after need a mask.
    """
    lo = 0
    hi = length
    if DOCUMENTS:
        lo = tl.load(seq_start + first) // BLOCK_N * BLOCK_N
        hi = tl.load(seq_end + last)
    if CAUSAL:
        hi = last + 1
        plain = (first + 1) // BLOCK_N * BLOCK_N
    elif DOCUMENTS:
        plain = tl.load(seq_end + first) // BLOCK_N * BLOCK_N
    else:
        plain = length // BLOCK_N * BLOCK_N
    inner = lo
    if DOCUMENTS:
        plain = tl.maximum(plain, lo)
        inner = tl.minimum(tl.cdiv(tl.load(seq_start + last), BLOCK_N) * BLOCK_N, plain)
    return lo, inner, plain, hi


@triton.jit
def sees(token, cols, start, end, length, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """``[rows, keys]`` mask of the sequence keys ``cols`` that each row's token sees; start, end: its document."""
    if CAUSAL:
        visible = cols[None, :] <= token[:, None]
    elif DOCUMENTS:
        visible = cols[None, :] < end[:, None]
    else:
        visible = (cols < length)[None, :]
    if DOCUMENTS:
        visible &= cols[None, :] >= start[:, None]
    return visible


@triton.jit
def depth_columns(n, base, width, n_slots, length, token, since, BLOCK_N: tl.constexpr, CHUNKED: tl.constexpr):
    """Depth keys n.. of a tile, flattened to (slot, token of the window ``base .. base + width``).

    Returns slot and token of each column, whether it exists, and the ``[rows, keys]`` mask of what each row sees: its own token's
    slots or, ``CHUNKED``, those of the tokens ``since .. token``.
    """
    j = n + tl.arange(0, BLOCK_N)
    slot = j // width
    u = base + j % width
    if CHUNKED:
        visible = (u[None, :] <= token[:, None]) & (u[None, :] >= since[:, None])
    else:
        visible = u[None, :] == token[:, None]
    return slot, u, (slot < n_slots) & (u < length), visible & (slot < n_slots)[None, :]


@triton.jit
def softmax_step(s, v, acc, m, den, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein 2018; FlashAttention-2, algorithm 1).

    ``s`` holds raw scores ``[rows, keys]``, -inf where hidden. ``m`` is the running maximum in exponents of two and
    ``den`` the running denominator. A row may have seen no key so far only where ``MASKED``.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    if MASKED:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        base = m_new
    p = tl.math.exp2(s * scale_log2 - base[:, None])
    shrink = tl.math.exp2(m - base)
    den = den * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, den


@triton.jit
def natural_lse(m, den):
    """Natural-log LSE from a maximum in exponents of two and its denominator; ln 2 in two parts, so that it is rounded once."""
    return m * 0.693145751953125 + (m * 1.4286068203094172e-06 + tl.log(den))


@triton.jit
def probabilities(s, lse_log2, scale_log2):
    """Normalised softmax of raw scores; ``lse_log2`` (broadcastable) is the row's LSE in exponents of two."""
    return tl.math.exp2(s * scale_log2 - lse_log2)


@triton.jit
def score_gradients(p, dp, delta):
    """Gradient of the scaled logits: ``p * (dp - delta)`` with ``delta = rowsum(do * o) - grad_lse``."""
    return p * (dp - delta)


# --- outside a kernel ------------------------------------------------------------------------------------------------


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tma_ready(*tensors: torch.Tensor) -> bool:
    """Whether Hopper's tensor copy engine can read these tensors: capability 9, 16-byte aligned rows, none expanded."""
    if any(t.device.type != "cuda" for t in tensors):
        return False
    if torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    for t in tensors:
        size = t.element_size()
        if t.data_ptr() % 16 or t.stride(-1) != 1:
            return False
        if any(n > 1 and (s == 0 or (s * size) % 16) for n, s in zip(t.shape[:-1], t.stride()[:-1])):
            return False
    return True


def tma_descriptor(x: torch.Tensor, rows: int, dim: int) -> Any:
    """Descriptor of ``x`` ``[B, T, H, D]`` as (B, H, T, D) with tiles of ``rows`` tokens of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    b, t, h, d = x.shape
    # The stride of a dimension of size one is arbitrary and may be misaligned: any legal value will do.
    strides = [s if n > 1 else x.stride(1) * t for n, s in ((b, x.stride(0)), (h, x.stride(2)))]
    token = x.stride(1) if t > 1 else h * d
    strides = [s if (s * x.element_size()) % 16 == 0 else token * t for s in strides]
    return TensorDescriptor(x, [b, h, t, d], [*strides, token, 1], [1, 1, rows, dim])


def tma_rows(x: torch.Tensor, length: int, rows: int) -> Any:
    """Descriptor of the first ``length`` columns of a contiguous ``[N, L]`` tensor, in pieces of ``rows``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [x.shape[0], length], [x.stride(0), 1], [1, rows])


@dataclass(frozen=True)
class Tile:
    """A named launch shape: ``block_m`` query rows by ``block_n`` keys."""

    name: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The compiler's part, as keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


class TileChooser:
    """Times the tiles of a short list once for each kind of problem and remembers the fastest.

    A tile that does not compile or does not fit the device's shared memory or registers is out. ``MODA_AUTOTUNE=0`` takes the
    first tile that launches, without timing (tests; runs that must not depend on a measurement).
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.chosen: dict[Hashable, Tile] = {}
        self.timings: dict[Hashable, list[tuple[str, float | None]]] = {}

    def choose(
        self, key: Hashable, tiles: Sequence[Tile], launch: Callable[[Tile], None], device: torch.device
    ) -> Tile:
        """The tile for ``key``. ``launch`` must leave a correct result however often it is called."""
        if key in self.chosen:
            return self.chosen[key]
        if len(tiles) == 1 or device.type != "cuda":
            self.chosen[key] = tiles[0]
            return tiles[0]
        timed = os.environ.get("MODA_AUTOTUNE", "1") != "0"
        times: list[tuple[str, float | None]] = []
        best: tuple[float, Tile] | None = None
        failure: Exception | None = None
        for tile in tiles:
            try:
                launch(tile)
                ms = _time(functools.partial(launch, tile)) if timed else 0.0
            except Exception as error:  # the compiler has many error types
                if not _is_resource_error(error):
                    raise
                failure = error
                times.append((tile.name, None))
                continue
            times.append((tile.name, ms))
            if best is None or ms < best[0]:
                best = (ms, tile)
            if not timed:
                break
        if best is None:
            raise RuntimeError(f"{self.kernel}: no tile of {[t.name for t in tiles]} fits this device") from failure
        self.chosen[key] = best[1]
        self.timings[key] = times
        log.info("%s: tile %s for %s (ms: %s)", self.kernel, best[1].name, key, times)
        return best[1]


def _is_resource_error(error: Exception) -> bool:
    from triton.runtime.errors import OutOfResources

    kinds: tuple[type, ...] = (OutOfResources,)
    with contextlib.suppress(ImportError):  # a Triton without these classes raises neither
        from triton.compiler.errors import CompileTimeAssertionFailure
        from triton.runtime.errors import PTXASError

        kinds += (CompileTimeAssertionFailure, PTXASError)
    return isinstance(error, kinds) or "PassManager" in str(error)


def _time(run: Callable[[], None], repeats: int = 5) -> float:
    """Median milliseconds of ``run`` (already warm) by CUDA events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    return times[repeats // 2]
