"""Tile shapes of the Triton kernels, and the choice among a short list of them by timing."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Tile", "TileChooser"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    :param keys: key rows of one step; in the depth kernels slots times packed heads, in a flush slots.
    :param rows: query rows of a program, or of a step where a program owns keys; 0 where the kernel derives them.
    :param stages: depth of the software pipeline. :param warps: warps of a program.
    :param registers: cap of a thread's registers, so that more programs fit on a multiprocessor.
    :param heads: key/value heads of a depth kernel's program; as many as fill 16 query rows if None.
    """

    keys: int
    stages: int
    warps: int
    rows: int = 0
    registers: int | None = None
    heads: int | None = None

    @property
    def name(self) -> str:
        capped = "" if self.registers is None else f"_registers{self.registers}"
        return f"rows{self.rows}_keys{self.keys}_warps{self.warps}_stages{self.stages}{capped}"

    @property
    def options(self) -> dict[str, int | None]:
        """The compiler's part, as keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class TileChooser:
    """Times the tiles of a short list once for each kind of problem and remembers the fastest.

    A tile that does not compile or does not fit the device's shared memory or registers is out. ``MODA_AUTOTUNE=0`` takes the
    first tile that launches, without timing (tests; runs that must not depend on a measurement).
    Triton's autotuner always times every configuration: it cannot take the first that launches.
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
