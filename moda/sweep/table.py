"""A sweep on the terminal: what it comes to, and how its runs stand."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moda.train.memory import estimate_memory
from moda.train.plan import make_plan
from moda.train.progress import format_duration

from .match import flops_per_token, model_of, tokens_of
from .run import Board
from .spec import Cell
from .state import State, tokens_per_second

#: What training reaches of the rate of a large matrix product, where nothing has been measured.
SHARE = 0.3


def matrix_rate() -> float:
    """Floating-point operations per second of a large product on this machine, measured in a moment."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    (a @ a).sum().item()
    started = time.perf_counter()
    (a @ a).sum().item()
    return 2 * n**3 / (time.perf_counter() - started)


def estimate_seconds(cells: Sequence[Cell]) -> tuple[dict[str, float], str]:
    """Seconds of each run from its beginning, and where that is from: measured speeds of this sweep's runs, or a guess."""
    measured = {cell.name: speed for cell in cells if (speed := tokens_per_second(cell.folder)) is not None}
    rates = [speed * flops_per_token(cell.config) for cell in cells if (speed := measured.get(cell.name))]
    rate = sum(rates) / len(rates) if rates else SHARE * matrix_rate()
    seconds = {
        cell.name: tokens_of(cell.config) / measured.get(cell.name, rate / flops_per_token(cell.config))
        for cell in cells
    }
    source = f"from {len(rates)} measured runs" if rates else f"{SHARE:.0%} of this machine's matrix rate"
    return seconds, f"{source}, {rate / 1e12:.3g} TFLOP/s"


def _duration(seconds: float) -> str:
    """Days alone where there are more than two: an estimate."""
    return format_duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} d"


def plan_table(cells: Sequence[Cell], states: Mapping[str, State], processes: int, at_a_time: int) -> tuple[Table, str]:
    """What every run comes to, and the sum in words.

    :raises UserError: for a run that cannot be trained by so many processes, by name.
    """
    seconds, source = estimate_seconds(cells)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "params M", "GFLOP", "tokens M", "GiB", "time", "state"):
        justify: Literal["left", "right"] = "left" if heading in ("run", "state") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading != "run", overflow="fold")
    for cell in cells:
        plan = make_plan(cell.config, processes)
        table.add_row(
            Text(cell.name), f"{model_of(cell.config).num_counted_params / 1e6:,.2f}",
            f"{plan.flops_per_token / 1e9:,.3g}", f"{tokens_of(cell.config) / 1e6:,.1f}",
            f"{sum(estimate_memory(plan).values()) / 2**30:,.1f}", _duration(seconds[cell.name]),
            states[cell.name].kind,
        )  # fmt: skip
    left = sum(seconds[cell.name] for cell in cells if states[cell.name].kind != "finished")
    tokens = sum(tokens_of(cell.config) for cell in cells)
    total = f"runs: {len(cells)}, tokens: {tokens:,}, training left: {_duration(left)}"
    if at_a_time > 1:
        total += f", {_duration(left / at_a_time)} with {at_a_time} runs at a time"
    changed = [f"{cell.name}: {cell.changed}" for cell in cells if cell.changed]
    return table, "\n".join([*changed, f"{total} (estimate: {source})"])


def _kind(board: Board, name: str) -> str:
    return "failed" if name in board.notes else "running" if name in board.running else board.states[name].kind


def board_table(board: Board) -> Table:
    """How the runs stand."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "step", "loss", "tokens/s", "ETA"):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right")
    for cell in board.cells:
        state, name = board.states[cell.name], cell.name
        kind = _kind(board, name)
        figures = state.figures
        eta = format_duration(figures["eta_seconds"]) if kind == "running" and "eta_seconds" in figures else ""
        table.add_row(
            Text(name), kind, f"{state.step}/{cell.config.train.steps}",
            f"{figures['loss']:.4f}" if "loss" in figures else "",
            f"{figures['tokens_per_second']:,.0f}" if "tokens_per_second" in figures else "", eta,
        )  # fmt: skip
    return table


def lines(console: Console) -> Callable[[Board], None]:
    """Where there is no terminal: one line when a run starts, ends or fails."""
    said: dict[str, str] = {}

    def show(board: Board) -> None:
        for cell in board.cells:
            name = cell.name
            kind = _kind(board, name)
            if kind != "new" and said.get(name, "unfinished") != kind:
                said[name] = kind
                step = f"step {board.states[name].step}/{cell.config.train.steps}"
                console.print(f"{name}: {kind}, {step}", highlight=False, markup=False, soft_wrap=True)

    return show
