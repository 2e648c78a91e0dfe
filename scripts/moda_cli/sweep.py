"""Train every run of a sweep. What is finished is skipped, what is not is resumed, a failed run does not stop the others.

Examples:
  %(prog)s configs/sweeps/demo.yaml --dry-run
  %(prog)s configs/sweeps/table6.yaml --data data/mine --gpus 0,1
  %(prog)s configs/sweeps/table6.yaml --slurm slurm_partition=gpu timeout_min=720 gpus_per_node=1
"""

import argparse
import contextlib
import re

from moda.ranges import Count

from ._options import new_parser, number

RESUME = "its runs have saved; the same command resumes them"


def _gpus(text: str) -> list[str]:
    """Numbers or names of GPUs, as CUDA_VISIBLE_DEVICES has them: anything else there would hide all of them."""
    gpus = text.split(",")
    if len(set(gpus)) != len(gpus) or not all(re.fullmatch(r"[0-9]+|(GPU|MIG)-[\w/-]+", gpu) for gpu in gpus):
        raise argparse.ArgumentTypeError(f"expected different GPUs such as 0,1, got {text!r}")
    return gpus


def parser() -> argparse.ArgumentParser:
    p = new_parser(__doc__)
    p.add_argument("sweep", metavar="SWEEP", help="a YAML file, such as configs/sweeps/demo.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of every run")
    p.add_argument("--data", metavar="FOLDER", help="a folder that `moda prepare` made: every run trains on it")
    p.add_argument("--gpus", type=_gpus, metavar="0,1,...", help="GPUs to use (default: all that are there)")
    p.add_argument("--gpus-per-run", type=number(Count), default=1, metavar="N", help="GPUs of one run")
    p.add_argument(
        "--jobs", type=number(Count), default=1, metavar="N", help="runs at a time on the same GPUs, or on the CPU"
    )
    p.add_argument("--only", metavar="TEXT", help="the runs whose name contains TEXT")
    p.add_argument("--dry-run", action="store_true", help="print every run with its sizes and time, and exit")
    p.add_argument(
        "--slurm", nargs="+", metavar="name=value", help="submit the runs as a Slurm array: submitit's options"
    )
    return p


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.live import Live

    from moda.errors import UserError
    from moda.sweep import load_sweep
    from moda.sweep.data import missing_data, prepared
    from moda.sweep.run import run_sweep, workers
    from moda.sweep.slurm import submit
    from moda.sweep.state import check_folder, state_of
    from moda.sweep.table import board_table, lines, plan_table

    sweep = load_sweep(args.sweep, [*(prepared(args.data) if args.data is not None else []), *args.overrides])
    cells = [cell for cell in sweep.cells if args.only is None or args.only in cell.name]
    if not cells:
        raise UserError("--only", "part of a run's name", args.only, ", ".join(c.name for c in sweep.cells[:8]))
    gpus = args.gpus or [str(i) for i in range(torch.cuda.device_count())]
    if not args.slurm and args.gpus_per_run > max(len(gpus), 1):
        raise UserError("--gpus-per-run", f"at most the {len(gpus)} GPUs", args.gpus_per_run)
    available = workers(gpus, min(args.jobs, len(cells)), min(args.gpus_per_run, len(gpus) or 1))
    processes = args.gpus_per_run if args.slurm else available[0].processes
    for cell in cells:
        check_folder(cell)
    states = {cell.name: state_of(cell) for cell in cells}
    table, total = plan_table(cells, states, processes, len(available))
    console = Console()
    console.print(table)
    console.print(total, highlight=False)
    missing = missing_data(cells)
    if missing is not None:
        hint = "; ".join(
            filter(None, [missing.hint, f"get it with: {sweep.section.data}" if sweep.section.data else ""])
        )
        missing = UserError(missing.key, missing.expected, missing.got, hint or None)
    if args.dry_run:
        if missing is not None:
            console.print(f"data is missing: {missing}", highlight=False, markup=False, soft_wrap=True)
        return 0
    if missing is not None:
        raise missing
    if args.slurm:
        left = [cell for cell in cells if states[cell.name].kind != "finished"]
        jobs = submit(left, sweep.folder / "slurm", args.slurm, processes)
        console.print(f"submitted: {', '.join(jobs)}", highlight=False)
        return 0
    logs, live = sweep.folder / "logs", Live(console=console, refresh_per_second=2)
    with live if console.is_terminal else contextlib.nullcontext():
        show = (lambda b: live.update(board_table(b))) if console.is_terminal else lines(console)
        board = run_sweep(cells, logs, available, show)
    if not console.is_terminal:
        console.print(board_table(board))
    for name in board.failed:
        console.print(f"{name} failed: {board.notes[name]}", highlight=False, markup=False, soft_wrap=True)
    finished = f"{len(cells) - len(board.failed)} of {len(cells)} runs are finished"
    console.print(f"{finished}: `moda report {sweep.folder}` compares them", highlight=False, soft_wrap=True)
    return 1 if board.failed else 0
