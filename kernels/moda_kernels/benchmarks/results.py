"""The CSV files of all benchmarks: rows, and in each row where and when it was measured."""

import contextlib
import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch


def commit() -> str:
    """The commit of this checkout, ``-dirty`` if files differ from it; ``MODA_COMMIT`` where git does not come along."""
    given = os.environ.get("MODA_COMMIT", "")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def provenance() -> dict[str, str]:
    """GPU, CPU, versions, commit and date: the columns that say where a figure is from. Empty where there is none."""
    where = dict.fromkeys(("gpu", "capability", "cpu", "python", "torch", "triton", "cuda", "cudnn"), "")
    where.update(cpu=_processor(), python=platform.python_version(), torch=torch.__version__)
    if torch.cuda.is_available():
        where["gpu"] = torch.cuda.get_device_name()
        where["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        where.update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
    with contextlib.suppress(ImportError):
        import triton

        where["triton"] = triton.__version__
    return {**where, "commit": commit(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


def write(path: Path, rows: Sequence[Mapping[str, object]], where: Mapping[str, str] | None = None) -> Path:
    """Write rows, each with its provenance, whole or not at all.

    :param rows: at least one; the first one's keys are the columns.
    :param where: the :func:`provenance` of all rows where it is known already.

    :returns: ``path``.
    """
    where = provenance() if where is None else where
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(
        f".{path.name}.{os.getpid()}.partial"
    )  # as moda.files does, which the operator alone lacks
    try:
        with scratch.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, dict.fromkeys([*rows[0], *where]))
            writer.writeheader()
            writer.writerows({**where, **row} for row in rows)
            f.flush()
            os.fsync(f.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def merge(
    path: Path, rows: Sequence[Mapping[str, object]], key: Sequence[str], where: Mapping[str, str] | None = None
) -> Path:
    """:func:`write`, keeping the rows of an earlier file that differ in a column of ``key``: a table in several runs.

    :param rows: at least one; an earlier file with other columns is replaced.
    """
    where = provenance() if where is None else where
    fresh = [{**where, **row} for row in rows]
    columns, kept = {*fresh[0]}, []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as f:
            kept = [row for row in csv.DictReader(f) if {*row} == columns]
    measured = {tuple(str(row[name]) for name in key) for row in fresh}
    kept = [row for row in kept if tuple(row[name] for name in key) not in measured]
    order = dict.fromkeys([*rows[0], *where])
    return write(path, [{name: row[name] for name in order} for row in [*kept, *fresh]], {})
