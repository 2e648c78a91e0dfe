"""The named choices of configuration keys; :mod:`moda.config.schema` says what they mean."""

from __future__ import annotations

from enum import Enum

__all__ = ["Auto", "Backend", "Checkpointing", "DataParallel", "Float8", "Optimizer", "QKNorm"]


class Auto(str, Enum):
    auto = "auto"


class QKNorm(str, Enum):
    full = "full"
    head = "head"
    none = "none"


class Backend(Enum):
    auto = "auto"
    reference = "reference"
    fused = "fused"
    split = "split"


class Optimizer(str, Enum):
    adamw = "adamw"
    skip_step_adamw = "skip_step_adamw"


class DataParallel(str, Enum):
    fsdp = "fsdp"
    hsdp = "hsdp"
    ddp = "ddp"


class Float8(str, Enum):
    tensorwise = "tensorwise"
    rowwise = "rowwise"


class Checkpointing(str, Enum):
    auto = "auto"
    none = "none"
    full = "full"
    selected_blocks = "selected_blocks"
    selected_modules = "selected_modules"
    selected_ops = "selected_ops"
    budget = "budget"
