"""Tile shapes of the Triton kernels, and the choice among a short list of them by timing, once per card."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import tile_cache
from .problem import Problem

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
    def options(self) -> dict[str, int | None]:
        """The compiler's part, as keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


INTERPRETER_TILES = (Tile(rows=32, keys=32, warps=1, stages=1),)


class TileChooser:
    """Times the tiles of a short list (for head dims up to 64, or above) once per kind of problem and remembers the fastest, on
    disk as well (:mod:`.tile_cache`).

    A tile that does not compile or does not fit the device's shared memory or registers is out. ``MODA_AUTOTUNE=0`` takes the
    first tile that launches, without timing (tests; runs that must not depend on a measurement).
    Triton's autotuner always times every configuration: it cannot take the first that launches.
    """

    def __init__(self, kernel: str, half: Sequence[Tile], wide: Sequence[Tile]) -> None:
        self.kernel = kernel
        self.half, self.wide = half, wide
        self.chosen: dict[tuple[int | None, str], Tile] = {}

    def tiles(self, p: Problem) -> Sequence[Tile]:
        """The short list for a problem."""
        if p.device.type != "cuda":
            return INTERPRETER_TILES
        return self.half if p.head_dim <= 64 else self.wide

    def choose(self, key: tuple[int | None, str], p: Problem, launch: Callable[[Tile], None]) -> Tile:
        """The tile for a device's index and a problem. ``launch`` must leave a correct result however often it is called."""
        if key in self.chosen:
            return self.chosen[key]
        tiles = self.tiles(p)
        if len(tiles) == 1 or p.device.type != "cuda":
            return self.chosen.setdefault(key, tiles[0])
        timed = os.environ.get("MODA_AUTOTUNE", "1") != "0"
        if timed and (before := self._known(key[1], p, launch)) is not None:
            return self.chosen.setdefault(key, before)
        times: dict[Tile, float] = {}
        failure: Exception | None = None
        for tile in tiles:
            try:
                launch(tile)
                times[tile] = _time(functools.partial(launch, tile)) if timed else 0.0
            except Exception as error:  # the compiler has many error types
                if not _is_resource_error(error):
                    raise
                failure = error
            if times and not timed:
                break
        if not times:
            raise RuntimeError(f"{self.kernel}: no tile of {tiles} fits this device") from failure
        self.chosen[key] = best = min(times, key=lambda tile: times[tile])
        log.info("%s: %s for %s (ms: %s)", self.kernel, best, key[1], times)
        if timed:
            tile_cache.remember(p.device, self.kernel, key[1], best)
        return best

    def _known(self, problem: str, p: Problem, launch: Callable[[Tile], None]) -> Tile | None:
        """A tile that was chosen before, is on the list still, and launches."""
        for fields in tile_cache.known(p.device, self.kernel, problem):
            tile = next((t for t in self.tiles(p) if t == _tile(fields)), None)
            try:
                if tile is not None:
                    launch(tile)
                    return tile
            except Exception as error:
                if not _is_resource_error(error):
                    raise
        return None


def _tile(fields: dict[str, Any]) -> Tile | None:
    try:
        return Tile(**fields)
    except TypeError:  # of another version, or edited
        return None


def _is_resource_error(error: Exception) -> bool:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, (OutOfResources, CompileTimeAssertionFailure, PTXASError)) or "PassManager" in str(error)


def _time(run: Callable[[], None], repeats: int = 5) -> float:
    """Median milliseconds of ``run`` (already warm) by CUDA events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))[repeats // 2]
