"""Running a stage: datatrove's executors for one machine, Ray and Slurm, behind one call.

A task that fails leaves its reason in ``state/errors``, because the executors lose it in different ways.
"""

import contextlib
import copy
import errno
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from moda.errors import UserError
from moda.files import read_json, write_json

if TYPE_CHECKING:
    from .options import PrepareOptions


def disk_full(e: BaseException, folder: str | Path) -> UserError | None:
    """The error for a full disk, where that is what ``e`` says."""
    if not isinstance(e, OSError) or e.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    hint = "free some and run the same command again: it resumes from here"
    return UserError("output", f"enough disk space under {folder}", hint=hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """datatrove's logs go to its log files only: the terminal shows progress."""
    logger.remove()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
    logger.remove()


def _note_error(state: str, stage: str, rank: int, e: BaseException) -> None:
    error = e if isinstance(e, UserError) else disk_full(e, Path(state).parent)
    if error is None:
        what = "".join(traceback.format_exception_only(type(e), e)).strip()
        log = f"{state}/stages/{stage}/logs/task_{rank:05d}.log"
        error = UserError(f"task {rank} of stage {stage}", "no failure", what, f"see {log}")
    note = [error.key, error.expected, None if error.got is None else str(error.got), error.hint]
    with contextlib.suppress(OSError):  # on a full disk the exception itself is still raised
        write_json(Path(state) / "errors" / f"{stage}-{rank:05d}.json", note)


class _Noted:
    """What our executors do around a task: keep the terminal quiet, and note the reason of a failure."""

    state: str
    stage: str
    pipeline: list[Any]

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per task: no threads inside
        try:
            with _quiet():
                return super()._run_for_rank(rank, local_rank, node_rank)  # type: ignore[misc]
        except Exception as e:
            _note_error(self.state, self.stage, rank, e)
            raise RuntimeError(str(e)) from None  # one that can be pickled


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the first one deals with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Local(_Noted, LocalPipelineExecutor):
    def run(self) -> None:
        """datatrove's loop without its manager process, which outlives a killed parent."""
        ranks = self.get_incomplete_ranks()
        self.save_executor_as_json()
        if self.workers == 1:
            pipeline = self.pipeline
            try:
                for rank in ranks:
                    self.pipeline = copy.deepcopy(pipeline)
                    self._run_for_rank(rank)
            finally:
                self.pipeline = pipeline
            return
        context = multiprocess.get_context(self.start_method)
        with context.Pool(min(self.workers, len(ranks)), initializer=_leave_interrupts) as pool:
            for _ in pool.imap_unordered(self._run_for_rank, ranks):
                pass


class _Ray(_Noted, RayPipelineExecutor):
    pass


class _Slurm(_Noted, SlurmPipelineExecutor):
    pass


def make_executor(
    options: "PrepareOptions", pipeline: list[PipelineStep], tasks: int, *, state: str, stage: str, workers: int
) -> Any:
    """datatrove's executor of a stage, as the options name it.

    :param workers: tasks that run at a time.
    """
    slurm = {"mail_type": "NONE", "job_name": f"prepare-{stage}", **(options.slurm or {})}
    kinds: dict[str, tuple[type[Any], dict[str, Any]]] = {
        "local": (_Local, {}), "ray": (_Ray, {"mem_per_cpu_gb": 0.5}), "slurm": (_Slurm, slurm),
    }  # fmt: skip
    kind, further = kinds[options.executor.value]
    logs = f"{state}/stages/{stage}"
    executor = kind(pipeline=pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=logs, **further)
    executor.state, executor.stage = state, stage
    return executor


def raise_errors(state: str) -> None:
    """The first failure that a task noted, as an error of this process.

    :raises UserError: if there is one.
    """
    notes = sorted((Path(state) / "errors").glob("*.json"))
    if notes:
        raise UserError(*read_json(notes[0], "output", list))


def run_stage(executor: Any) -> None:
    """Run a stage to its end where it runs here, or submit it.

    :raises UserError: with the reason of the first task that failed.
    """
    failure: Exception | None = None
    try:
        with _quiet():
            executor.run()
    except (RuntimeError, OSError) as e:
        failure = e
    raise_errors(executor.state)
    if failure is not None:
        raise disk_full(failure, executor.state) or failure


def start_ray(address: str | None) -> None:
    """Join the Ray cluster at ``address``, or start one on this machine; its workers find this project's packages.

    :raises UserError: where Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise UserError("executor", "Ray to be installed (pip install ray)", "ray") from None
    root = str(Path(__file__).resolve().parents[3])
    paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    if not ray.is_initialized():
        environment = {"env_vars": {"PYTHONPATH": paths}}
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as e:
            reason = str(e).split("\n")[0]
            raise UserError("ray_address", "a Ray cluster that can be reached", address, reason) from None
