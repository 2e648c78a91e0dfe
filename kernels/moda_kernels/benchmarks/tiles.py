"""Tile choices of the fused kernels for this card, timed afresh: what comes with the package (``measured_tiles.json``).

Every problem of the tables, and every other size of its sequence that is common; a choice holds for sizes up to a factor of two.
Choices of other cards in the file stay.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from moda_kernels.moda_attention import moda_attention, tile_cache

from .cases import TABLES, Case, draw
from .registry import Benchmark, require_gpu

#: Group size, slots, head dim and kv heads of the models in ``configs/``.
_MODELS = ((2, 72, 64, 8), (3, 48, 64, 2), (1, 48, 64, 12), (8, 64, 128, 8))


def cases() -> Iterator[Case]:
    """What is timed."""
    yield from (case for table in TABLES.values() for case in table if not case.fp8 and case.T <= 16384)
    for G, S, D, Hk in _MODELS:
        for T in (512, 2048, 4096, 8192):
            yield Case("tiles", "models", T, G, S, Hk=Hk, D=D, B=max(1, 32768 // T))


def measure(case: Case) -> None:
    """Forward and backward of a case, which chooses its tiles."""
    x = draw(case)
    tensors = {
        n: t.requires_grad_() for n, t in x.items() if n in ("q", "k", "v", "depth_k", "depth_v") and t is not None
    }
    out = moda_attention(
        tensors["q"], tensors.get("k"), tensors.get("v"), tensors.get("depth_k"), tensors.get("depth_v"),
        causal=case.causal, depth_chunk=case.depth_chunk, cu_seqlens=x["cu_seqlens"], slots=case.slots, backend="fused",
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    out.backward(torch.randn_like(out))


def _add_options(parser: argparse.ArgumentParser, root: Path) -> None:
    parser.add_argument(
        "--out", type=Path, default=tile_cache.MEASURED, help="the file to add to (default: the package's)"
    )


def _run(args: argparse.Namespace) -> None:
    require_gpu()
    kind, card = tile_cache.cards(torch.device("cuda", torch.cuda.current_device()))
    written = json.loads(args.out.read_text()) if args.out.is_file() else {}
    listed = list(cases())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MODA_TILE_CACHE"] = str(Path(folder) / "tiles.json")
        tile_cache.MEASURED = Path(folder) / "none"  # what it says would not be timed
        for i, case in enumerate(listed, 1):
            measure(case)
            print(f"{i}/{len(listed)} {case.name}", flush=True)
        written[kind] = json.loads(Path(os.environ["MODA_TILE_CACHE"]).read_text())[card]
    tile_cache.write(args.out, written)
    print(f"{args.out}: {sum(map(len, written[kind].values()))} choices for {kind}")


BENCHMARK = Benchmark("tiles", "tile choices of the fused kernels, to come with the package", _add_options, _run)
