"""Whole training steps of one configuration on some processes of this machine: the real trainer, started for it and measured.

``python -m moda.bench.point FILE`` is one of those processes; :func:`measure` starts them and returns what they report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from olmo_core.distributed.utils import all_reduce_value, get_rank, get_world_size, init_distributed
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.train import LoadStrategy, teardown_training_environment
from olmo_core.train.callbacks import Callback
from olmo_core.utils import get_default_device

from moda.config import load_config
from moda.config.data import DataConfig
from moda.config.schema import CheckpointConfig, EvalConfig, LoggingConfig, RunConfig
from moda.data import load_tokenizer
from moda.data.token_files import token_dtype
from moda.errors import UserError
from moda.files import writing
from moda.train.build import build_data_loader, build_train_module, build_trainer, peak_flops
from moda.train.environment import launched_world_size, on_first_rank, prepare_environment
from moda.train.memory import this_machine
from moda.train.plan import Plan, make_plan
from moda.train.run import prepare_data
from moda_kernels.benchmarks.timing import quantiles

from .breakdown import KINDS, breakdown, kernels_of, unknown

#: Steps before the timed ones: they compile, choose tiles and capture graphs.
WARMUP = 4
#: Steps that are profiled, after the timed ones.
PROFILED = 2
OURS, OLMO_CORE = "moda", "olmo-core"

_FIGURES = (
    "params", "flops_per_token", "step_ms", "p20_ms", "p80_ms", "tokens_per_second", "tokens_per_second_per_gpu", "mfu_percent",
    "peak_gib", "first_step_s",
)  # fmt: skip
_PROFILE = tuple(f"{kind}_ms" for kind in (*KINDS, "gaps", "communication_all"))


@dataclass(frozen=True)
class Point:
    """What is measured.

    :param config: a configuration file. :param overrides: for it, as typed.
    :param variant: ``olmo-core`` for a plain model as OLMo-core trains it: its attention and loss, FSDP for one process too.
    :param gpus: processes. :param replicas: copies of the model under HSDP; 1 for what the configuration says.
    :param microbatches: of each process in a step. :param batch: or sequences in a step, over all processes.
    :param steps: that are timed.
    :param profile: whether some more are profiled (on GPUs).
    :param tokens: token files to train on; random ids without.
    """

    config: str
    overrides: list[str] = field(default_factory=list)
    variant: str = OURS
    gpus: int = 1
    replicas: int = 1
    microbatches: int = 2
    batch: int | None = None
    steps: int = 10
    profile: bool = False
    tokens: list[str] | None = None

    @property
    def last(self) -> int:
        return WARMUP + self.steps + (PROFILED if self.profile else 0)

    def row(self, status: str = "not run", **figures: Any) -> dict[str, Any]:
        """A row of a table; all rows have the same columns."""
        what = {
            "config": Path(self.config).stem, "overrides": " ".join(self.overrides), "variant": self.variant,
            "gpus": self.gpus, "sharding": "hsdp" if self.replicas > 1 else "", "replicas": self.replicas,
            "microbatch": "", "checkpointing": "", "batch": self.batch or "", "status": status,
        }  # fmt: skip
        return what | dict.fromkeys((*_FIGURES, *_PROFILE), "") | figures


@dataclass
class _Clock(Callback):
    """Marks the ends of steps without waiting for them, and profiles the last ones."""

    priority: ClassVar[int] = 1_000_000  # before the monitor of memory begins a new peak

    point: Point = field(default_factory=lambda: Point(""))
    first: float = 0.0
    peak: int = 0
    profiler: Any = None
    _began: float = 0.0
    _marks: list[Any] = field(default_factory=list)

    @property
    def _gpu(self) -> bool:
        return self.trainer.device.type == "cuda"

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()

    def pre_train(self) -> None:
        self._began = time.perf_counter()

    def post_step(self) -> None:
        if self.step == 1:
            self._wait()
            self.first = time.perf_counter() - self._began
        timed = self.step - WARMUP
        if 0 <= timed <= self.point.steps:
            self._marks.append(time.perf_counter() if not self._gpu else torch.cuda.Event(enable_timing=True))
            if self._gpu:
                self._marks[-1].record()
        if self._gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            if self.point.profile and timed == self.point.steps:
                self._wait()
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
            elif self.profiler is not None and self.step == self.point.last:
                self._wait()
                self.profiler.stop()

    def milliseconds(self) -> list[float]:
        """Of each timed step."""
        self._wait()
        pairs = zip(self._marks, self._marks[1:])
        return [a.elapsed_time(b) if self._gpu else 1e3 * (b - a) for a, b in pairs]


def _settings(point: Point, folder: Path) -> Plan:
    """The plan of the point's run, in a folder of its own, and its token file."""
    config = load_config(point.config, point.overrides)
    world, parallel = launched_world_size(), config.parallel
    if point.replicas > 1:
        shared: Any = {"data": "hsdp", "shard_degree": world // (point.replicas * parallel.tensor * parallel.pipeline)}
        config = load_config(point.config, [*point.overrides, *(f"parallel.{k}={v}" for k, v in shared.items())])
    train = config.train
    if not isinstance(train.microbatch_size, int):
        config = make_plan(config, world, this_machine()).config
    microbatch = config.train.microbatch
    together = parallel.tensor * parallel.context * parallel.pipeline
    batch = point.batch or microbatch * point.microbatches * world // together
    tokenizer = load_tokenizer(config.data.tokenizer)  # type: ignore[arg-type]
    vocab = tokenizer.config.vocab_size
    files = point.tokens or [str(folder / "random.npy")]
    data = config.data
    timed: RunConfig = dataclasses.replace(
        config,
        data=DataConfig(
            paths=files, tokenizer=data.tokenizer, document_masking=data.document_masking, num_workers=data.num_workers,
            work_dir=str(folder / "work"),
        ),
        train=dataclasses.replace(
            train, microbatch_size=microbatch, global_batch_size=batch, max_steps=point.last, max_tokens=None,
            save_folder=str(folder / "run"), load_path=None, load_other_reads=False,
        ),
        parallel=config.parallel,
        optim=dataclasses.replace(config.optim, warmup_steps=1),
        eval=EvalConfig(interval=None, on_start=False, on_finish=False),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(interval=config.logging.interval),
    )  # fmt: skip

    def write() -> None:
        dtype = token_dtype(vocab)
        count = point.last * batch * train.sequence_length
        with writing(Path(files[0]), "wb") as f:
            f.write(np.random.default_rng(0).integers(0, vocab, count, dtype=dtype).tobytes())

    if point.tokens is None:
        on_first_rank(write)
    plan = make_plan(timed, world, this_machine())
    if point.variant == OLMO_CORE:
        head = LMHeadConfig(layer_norm=plan.transformer.lm_head.layer_norm, bias=False)
        plain: Any = dataclasses.replace(plan.transformer, lm_head=head)  # type: ignore[arg-type]
        plan = dataclasses.replace(plan, transformer=plain)
    return plan


def train_steps(point: Point, folder: Path) -> dict[str, Any]:
    """Train the point's steps in this process, one of those of its group.

    :param folder: for files of the run.

    :returns: the row, on every rank.
    """
    if point.variant == OLMO_CORE and launched_world_size() == 1:
        init_distributed("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo", shared_filesytem=True)
    prepare_environment(0)
    plan = _settings(point, folder)
    c, device = plan.config, get_default_device()
    with patch.dict(os.environ, {"MODA_SEQUENCE_KERNEL": "cudnn"} if point.variant == OLMO_CORE else {}):
        module = build_train_module(plan, device)
    data = prepare_data(plan)
    trainer = build_trainer(plan, data, module, build_data_loader(plan, data, module))
    trainer.load_strategy = LoadStrategy.never
    trainer.callbacks["checkpointer"].enabled = False  # type: ignore[attr-defined]
    clock = _Clock(point=point)
    trainer.add_callback("clock", clock)
    trainer.fit()
    q = quantiles(clock.milliseconds())
    world = get_world_size()
    speed = c.train.tokens_per_step / q.median * 1e3
    peak, most = peak_flops(device), all_reduce_value(float(clock.peak), device, op=torch.distributed.ReduceOp.MAX)
    row = point.row(
        "ok", microbatch=c.train.microbatch, checkpointing=c.parallel.activation_checkpointing.value,
        batch=c.train.global_batch_size, sharding=c.parallel.data.value if world > 1 or point.variant == OLMO_CORE else "none",
        params=plan.transformer.num_params, flops_per_token=plan.flops_per_token,
        step_ms=round(q.median, 3), p20_ms=round(q.p20, 3), p80_ms=round(q.p80, 3), tokens_per_second=round(speed),
        tokens_per_second_per_gpu=round(speed / world),
        mfu_percent="" if peak is None else round(100 * speed / world * plan.flops_per_token / peak, 2),
        peak_gib=round(most / 2**30, 2) if most else "", first_step_s=round(clock.first, 2),
    )  # fmt: skip
    if clock.profiler is not None and get_rank() == 0:
        kernels = kernels_of(clock.profiler)
        parts = breakdown(kernels, PROFILED, q.median)
        row |= {f"{kind}_ms": round(ms, 3) for kind, ms in parts.items()}
        print("kernels of no known kind:", "; ".join(name[:80] for name in unknown(kernels)) or "none")
    teardown_training_environment()
    return row


def measure(point: Point, timeout: float = 240.0) -> dict[str, Any]:
    """Start the point's processes and wait for them.

    :param timeout: seconds after which they are ended.

    :returns: a row; of a point that does not run, with the reason in ``status``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, said = folder / "point.json", folder / "said"
        asked.write_text(json.dumps(dataclasses.asdict(point)))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.gpus}"]
        command = [sys.executable, *(launcher if point.gpus > 1 else []), "-m", "moda.bench.point", str(asked)]
        defaults = {
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "OMP_WAIT_POLICY": "PASSIVE",
        }  # as train sets them
        with said.open("w") as out:
            process = subprocess.Popen(
                command, env={**defaults, **os.environ}, stdout=out, stderr=out, start_new_session=True
            )
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                return point.row(f"failed: no end after {timeout:.0f} s")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)  # which torchrun passes on to its processes
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(60)  # it gives them 30 s
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        words = said.read_text(errors="replace").strip().splitlines()
        result = folder / "result.json"
        if not result.is_file():
            last = words[-1] if words else "nothing said"
            return point.row(f"failed: exit code {process.returncode}, {last}"[:200])
        for line in words:
            if line.startswith("kernels of no known kind: "):
                print(f"  {line}")
        return json.loads(result.read_text())


def _leave(folder: Path, row: dict[str, Any]) -> None:
    """The first rank that has something to say says it."""
    scratch = folder / f"result.{os.getpid()}"
    scratch.write_text(json.dumps(row))
    with contextlib.suppress(FileExistsError):
        os.link(scratch, folder / "result.json")


def main(path: str) -> int:
    """One process of a point; what comes out is ``result.json`` beside the file ``path``."""
    folder = Path(path).parent
    point = Point(**json.loads(Path(path).read_text()))
    try:
        row = train_steps(point, folder)
    except UserError as e:
        _leave(folder, point.row(f"refused: {e}"))
    except torch.OutOfMemoryError as e:
        _leave(folder, point.row(f"out of memory: {e}".splitlines()[0].split(". GPU")[0]))
    except Exception as e:
        _leave(folder, point.row(f"failed: {type(e).__name__}: {e}".splitlines()[0][:200]))
        if get_world_size() == 1:
            raise
    else:
        if int(os.environ.get("RANK", "0")) == 0:
            _leave(folder, row)
        return 0
    sys.stdout.flush()
    os._exit(1)  # at a usual end NCCL may wait for ranks that wait for this one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
