"""What is measured: the rows of the paper's tables and a few of ours.

From the paper (arXiv 2603.15619; one A100, bf16, forward and backward): Table 2 with B = 1, D = 64, Hk = 8, three sweeps
(T, G and the number L of depth layers, here S slots), and Table 7 at T = 1024, G = 8, Hq / Hk = 64 / 8, D = 64, L = 64.
The printed milliseconds are kept in ``paper_ms`` (FA2-Triton, MoDA) and, for Table 7, in :data:`PAPER_TABLE_7`. The
paper's C = 64 is the tile of its kernel, not the ``depth_chunk`` of this operator.

Ours: the training shape (T = 4096, 16 / 8 heads, 72 slots: the last layer but one of the 36-layer model), which is added to
Table 7, and the table ``siblings``: depth-only, non-causal and chunk-visible attention, lists of slots, slots in fp8, packed
documents, head dim 128.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moda_kernels.moda_attention.fp8 import CODES, dequantise, quantise

#: Milliseconds the paper prints for its four implementations (A100).
PAPER_TABLE_7 = {"naive PyTorch": 2128.900, "flash-compatible": 13.102, "+ chunk-aware": 6.286, "+ group-aware": 1.460}


@dataclass(frozen=True)
class Case:
    """One row.

    :param sweep: the axis that a plot shows it on.
    :param docs: the number of equally long documents.
    :param every: the S slots read are every so many of the buffers: 1 for a contiguous run.
    :param fp8: whether slots are e4m3 with a scale per row.
    """

    table: str
    sweep: str
    T: int
    G: int
    S: int
    Hk: int = 8
    D: int = 64
    B: int = 1
    causal: bool = True
    depth_chunk: int = 1
    sequence: bool = True
    docs: int = 1
    every: int = 1
    fp8: bool = False
    paper_ms: tuple[float | None, float] | None = None

    @property
    def name(self) -> str:
        extras = [] if self.causal else ["non-causal"]
        extras += [f"chunk{self.depth_chunk}"] if self.depth_chunk > 1 else []
        extras += [] if self.sequence else ["depth-only"]
        extras += [f"{self.docs}docs"] if self.docs > 1 else []
        extras += [f"every{self.every}"] if self.every > 1 else []
        extras += ["fp8"] if self.fp8 else []
        extras += [f"B{self.B}"] if self.B > 1 else []
        return "-".join([f"T{self.T}", f"G{self.G}", f"S{self.S}", f"D{self.D}", *extras])

    @property
    def slots(self) -> tuple[int, ...] | None:
        """The slots that are read, or None for all."""
        return None if self.every == 1 else tuple(range(0, self.S * self.every, self.every))


def _table_2() -> list[Case]:
    lengths = {
        4096: (7.970, 10.750),
        8192: (28.700, 35.427),
        16384: (116.700, 127.661),
        32768: (459.854, 480.914),
        65536: (1831.668, 1883.026),
    }
    groups = {2: (28.982, 39.741), 4: (58.071, 68.939), 16: (233.700, 244.900), 32: (467.107, 480.767)}
    slots = {128: (116.700, 138.224), 256: (116.700, 167.958)}
    rows = [Case("2", "T", T, 8, 64, paper_ms=ms) for T, ms in lengths.items()]
    rows += [Case("2", "G", 16384, G, 64, paper_ms=ms) for G, ms in groups.items()]
    return rows + [Case("2", "S", 16384, 8, S, paper_ms=ms) for S, ms in slots.items()]


TABLES: dict[str, list[Case]] = {
    "2": _table_2(),
    "7": [
        Case("7", "ablation", 1024, 8, 64, paper_ms=(None, PAPER_TABLE_7["+ group-aware"])),
        Case("7", "training", 4096, 2, 72),
        Case("7", "training", 4096, 2, 72, B=8),
    ],
    "siblings": [
        Case("siblings", "depth-only", 16384, 8, 64, sequence=False),
        Case("siblings", "depth-only", 4096, 2, 72, B=8, sequence=False),
        Case("siblings", "slot list", 4096, 2, 36, B=8, sequence=False),
        Case("siblings", "slot list", 4096, 2, 36, B=8, sequence=False, every=2),
        Case("siblings", "slot list", 4096, 2, 36, B=8, every=2),
        Case("siblings", "fp8", 4096, 2, 72, B=8, sequence=False, fp8=True),
        Case("siblings", "fp8", 4096, 2, 36, B=8, sequence=False, every=2, fp8=True),
        Case("siblings", "fp8", 16384, 8, 64, sequence=False, fp8=True),
        Case("siblings", "fp8", 4096, 2, 72, B=8, fp8=True),
        Case("siblings", "non-causal", 8192, 8, 64, causal=False),
        Case("siblings", "chunk", 8192, 8, 64, depth_chunk=4),
        Case("siblings", "chunk", 8192, 8, 64, depth_chunk=64),
        Case("siblings", "documents", 16384, 8, 64, docs=8),
        Case("siblings", "head-dim", 8192, 8, 64, D=128),
    ],
}


def slots(x: dict[str, torch.Tensor | None], name: str, dtype: torch.dtype, at: Any = slice(None)) -> torch.Tensor:
    """``depth_k`` or ``depth_v`` as numbers, at an index."""
    codes, scales = x[name], x[name.replace("depth", "scale")]
    assert codes is not None
    return codes[at].to(dtype) if scales is None else dequantise(codes[at], scales[at], dtype)


def draw(case: Case, length: int | None = None) -> dict[str, torch.Tensor | None]:
    """bf16 inputs and an output gradient on the GPU, fresh for each case; ``length`` overrides T (gate, compilation).

    Depth tensors of a case in fp8 are codes, with ``scale_k`` and ``scale_v``.
    """
    T = case.T if length is None else length
    g = torch.Generator(device="cuda").manual_seed(T + 31 * case.G + 17 * case.S)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=g, dtype=torch.float32).to(torch.bfloat16)

    x: dict[str, torch.Tensor | None] = dict.fromkeys(
        ("k", "v", "depth_k", "depth_v", "scale_k", "scale_v", "cu_seqlens")
    )
    x["q"] = normal(case.B, T, case.G * case.Hk, case.D)
    if case.sequence:
        x["k"], x["v"] = (normal(case.B, T, case.Hk, case.D) for _ in range(2))
    if case.S:
        shape = case.S * case.every, case.B, T, case.Hk, case.D
        for name in ("k", "v"):
            buffer = torch.empty(shape, device="cuda", dtype=CODES if case.fp8 else torch.bfloat16)
            scales = torch.empty(shape[:-1], device="cuda")
            for s in range(len(buffer)):  # slot by slot: no fp32 copy of the whole
                slot = normal(case.B, T, case.Hk, case.D)
                if case.fp8:
                    buffer[s], scales[s] = quantise(slot)
                else:
                    buffer[s] = slot
            x[f"depth_{name}"] = buffer
            x[f"scale_{name}"] = scales if case.fp8 else None
    if case.docs > 1:
        bounds = [i * T // case.docs for i in range(case.docs + 1)]
        x["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    x["grad_out"] = normal(case.B, T, case.G * case.Hk, case.D)
    return x
