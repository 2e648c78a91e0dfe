"""Resuming one's own run: weights, optimizer, data order and random states, without unpickling anything blindly.

OLMo-core's loader unpickles the table of contents, every shard and the trainer's state. Here the table is read by
:func:`.read_table` and all the rest by ``torch.load(weights_only=True)``, which knows tensors, numbers, strings and, for numpy's
random state, arrays. A save folder that is a URL is left to OLMo-core: what can write there is trusted.
"""

import contextlib
import io
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from olmo_core.distributed.utils import get_rank
from olmo_core.io import is_url
from olmo_core.train.checkpoint import Checkpointer
from olmo_core.train.train_module import TrainModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from moda.errors import UserError

from .find import STATE
from .trust import check_path, read_table


def check_own(folder: Path) -> None:
    """Check that a run's checkpoint belongs to the user who resumes from it; root may read all.

    :raises UserError: naming the first file that does not.
    """
    user = os.geteuid()
    for path in (folder, *sorted(folder.rglob("*"))):
        owner = path.stat().st_uid
        if user not in (0, owner):
            raise UserError(
                "train.save_folder", f"checkpoints owned by the user who resumes from them (user id {user})",
                f"{path} of user id {owner}", "train.load_path starts from the weights of anyone's checkpoint",
            )  # fmt: skip


class _Reader(dcp.FileSystemReader):
    """Torch's reader, which loads tensors with ``weights_only=True``, with a table of contents that is not unpickled blindly."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        table = read_table(Path(self.path))
        for entry in table.storage_data.values():
            check_path(Path(self.path), entry.relative_path)
            entry.transform_descriptors = None  # OLMo-core's entries lack this field of torch's
        table.storage_meta = StorageMeta(load_id=self.load_id)
        return table


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for anything but plain values; the same bytes are then loaded
        value.seek(0)
        super().load_bytes(read_item, value)


def read_trainer_state(folder: Path) -> dict[str, Any] | None:
    """This rank's state, or that of rank 0 where more ranks resume than have saved."""
    files = [folder / "train" / f"rank{rank}.pt" for rank in (get_rank(), 0)]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        return None
    array = np.zeros(1, np.uint32)  # numpy's random state is one
    names: list[Any] = [array.__reduce__()[0], np.ndarray, np.dtype, type(array.dtype)]
    try:
        with torch.serialization.safe_globals(names):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many kinds
        reason = str(e).split("\n")[0][:200]
        raise UserError("checkpoint", f"numbers, strings and tensors alone in {file}", hint=reason) from None


@contextlib.contextmanager
def saving_alone() -> Iterator[None]:
    """Torch warns at every save and load that a process without others "assumes the intent": it is the intent here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


@dataclass
class OwnCheckpointer(Checkpointer):
    """OLMo-core's checkpointer, with a loader that runs nothing from the folder.

    :param began: when the last save began, on the monotonic clock.
    """

    began: float = 0.0

    def save(self, *args: Any, **options: Any) -> None:
        self.began = time.monotonic()
        super().save(*args, **options)

    def save_async(self, *args: Any, **options: Any) -> Future[None]:
        self.began = time.monotonic()
        return super().save_async(*args, **options)

    def load(
        self,
        dir: os.PathLike[str] | str,
        train_module: TrainModule,
        *,
        load_trainer_state: bool | None = None,
        load_optim_state: bool | None = None,
        **options: Any,
    ) -> dict[str, Any] | None:
        """Load weights, optimizer and, unless ``load_trainer_state`` is false, return the trainer's state.

        :raises UserError: for a folder that cannot be read without running what it names.
        """
        if is_url(dir):
            options.update(load_trainer_state=load_trainer_state, load_optim_state=load_optim_state)
            return super().load(dir, train_module, **options)
        folder = Path(dir)
        trainer_state = None if load_trainer_state is False else read_trainer_state(folder)
        if load_trainer_state and trainer_state is None:
            raise UserError("checkpoint", f"the trainer's state in {folder / 'train'}", "none")
        state = train_module.state_dict_to_load(read_table(folder / STATE), optim=load_optim_state)
        try:
            dcp.load(
                state, storage_reader=_Reader(folder / STATE), planner=_Planner(), process_group=self.process_group
            )
        except CheckpointException as e:
            reason = next((str(error).split("\n")[0][:200] for error, _ in e.failures.values()), "")
            raise UserError("checkpoint", f"a checkpoint of this run in {folder}", hint=reason) from None
        train_module.load_state_dict(state)
        return trainer_state
