"""A sweep as a Slurm array, through submitit."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moda.errors import UserError

from .run import command
from .spec import Cell


def _value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text, text)


def submit(cells: Sequence[Cell], folder: Path, options: Sequence[str], processes: int) -> list[str]:
    """Submit one job per run, as one array, and return the jobs' numbers. A preempted job is queued again and resumes.

    :param folder: submitit's own files and the jobs' output.
    :param options: ``name=value`` pairs of submitit's executor (``slurm_partition=gpu``, ``timeout_min=720``,
        ``gpus_per_node=1``); ``cluster=local`` runs the jobs on this machine.

    :raises UserError: without submitit, or for an option that it refuses.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm", "the package submitit", hint="pip install -e '.[slurm]'") from None

    class Resumed(submitit.helpers.CommandFunction):
        """A command that is submitted again when its job is preempted."""

        def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            return submitit.helpers.DelayedSubmission(self, *args, **kwargs)

    given = dict(option.partition("=")[::2] for option in options)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=given.pop("cluster", None))
        executor.update_parameters(name=folder.parent.name, **{k: _value(v) for k, v in given.items()})
        with executor.batch():
            jobs = [executor.submit(Resumed(command(cell, processes))) for cell in cells]
    except (NameError, TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise UserError(
            "--slurm", "options that submitit accepts", " ".join(options), " ".join(str(e).split())
        ) from None
    return [job.job_id for job in jobs]
