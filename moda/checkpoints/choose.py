"""From a run's warm-up with scores (``model.depth.read: learned``) to a run that goes on with the slots of the largest ones.

The new run begins with the checkpoint of the old one: weights, optimizer, data order, random states and step. Files are copied as
they are; what the new model lacks (scores, projections of slots that nothing reads any more) leaves the table of contents.
"""

import dataclasses
import io
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from moda.config import to_yaml
from moda.config.model import ModelConfig
from moda.config.schema import RunConfig
from moda.depth.read import Learned, Listed
from moda.errors import UserError
from moda.files import check_new, write_json, write_text, writing
from moda.model import transformer_config
from moda.typed import from_dict, to_dict

from .find import CONFIG, STATE
from .read import SCORES, open_checkpoint, read_weights
from .seal import damage, write_checksums
from .settings import read_settings
from .trust import read_table

#: How the keys of a parameter begin: its own, and those of the optimizer's state and options.
_PREFIXES = ("model.", "optim.state.", "optim.param_groups.")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What was chosen.

    :param scores: those of each layer, in the order of the slots that it could choose from.
    :param candidates: these slots. :param slots: the ones it reads from now on.
    :param config: the configuration of the new run.
    """

    scores: list[list[float]]
    candidates: tuple[tuple[int, ...], ...]
    slots: Listed
    config: RunConfig


def choose_slots(folder: Path, run: Path) -> Chosen:
    """Fix the slots that a checkpoint's layers read, in a new run that goes on from there.

    :param folder: a checkpoint ``stepN`` that was trained with the policy ``learned``.
    :param run: the new run's folder, which gets ``config.yaml`` and a checkpoint of the same name.

    :raises UserError: for a checkpoint of another policy or name, a damaged one, scores that are not finite, and a folder that is
        not empty.
    """
    check_new(run)
    old = open_checkpoint(folder).model
    model = getattr(old, "model", None)
    read = getattr(getattr(model, "depth", None), "read", None)
    if not isinstance(model, ModelConfig) or not isinstance(read, Learned):
        got = "none" if read is None else read.to_plain()
        raise UserError("checkpoint", f"one that was trained with model.depth.read: {Learned.name}", got)
    depth: Any = model.depth
    layout = depth.layout(model.n_layers)
    weights = read_weights(folder, lambda name: name.endswith(SCORES))
    found = [weights.get(f"blocks.{layer}{SCORES}", torch.empty(0)) for layer in range(model.n_layers)]
    for layer, (of_layer, slots) in enumerate(zip(found, layout.reads)):
        if len(of_layer) < len(slots) or not of_layer.isfinite().all():
            raise UserError(
                "checkpoint", f"a finite score for each of the {len(slots)} slots of layer {layer}", of_layer
            )
    if re.fullmatch(r"step\d+", folder.resolve().name) is None:  # a run looks for nothing else, and would begin anew
        raise UserError(
            "checkpoint", "a folder stepN", str(folder), "the new run resumes from a folder of the same name"
        )
    if (reason := damage(folder)) is not None:  # checksums of the copy would hide it
        raise UserError("checkpoint", f"a whole checkpoint in {folder}", reason)
    scores = [of_layer.tolist()[: len(slots)] for of_layer, slots in zip(found, layout.reads)]
    listed = read.choose(scores, layout.kinds)
    model = dataclasses.replace(model, depth=dataclasses.replace(depth, read=listed))
    old_run = from_dict(RunConfig, read_settings(folder))
    train = dataclasses.replace(old_run.train, save_folder=str(run), load_path=None, load_other_reads=False)
    config = dataclasses.replace(old_run, name=run.resolve().name, model=model, train=train)

    new = transformer_config(model, old.vocab_size).build(init_device="meta")
    step = run / folder.resolve().name
    shutil.copytree(folder, step)
    _keep_parameters(step / STATE, {name for name, _ in new.named_parameters(remove_duplicate=False)})
    write_json(step / CONFIG, to_dict(config))
    write_checksums(step)
    write_text(run / "config.yaml", to_yaml(config))
    return Chosen(scores, layout.reads, listed, config)


def _keep_parameters(state: Path, names: set[str]) -> None:
    """Take all but these parameters, with their optimizer's state, out of the table of contents."""
    table = read_table(state)
    there = {key.removeprefix("model.") for key in table.state_dict_metadata if key.startswith("model.")}
    gone = tuple(f"{prefix}{name}" for name in there - names for prefix in _PREFIXES)

    def stays(key: str) -> bool:
        return not any(key == name or key.startswith(f"{name}.") for name in gone)

    table.state_dict_metadata = {key: entry for key, entry in table.state_dict_metadata.items() if stays(key)}
    table.storage_data = {index: entry for index, entry in table.storage_data.items() if stays(index.fqn)}
    if table.planner_data is not None:
        table.planner_data = {key: path for key, path in table.planner_data.items() if stays(key)}
    buffer = io.BytesIO()
    pickle.dump(table, buffer)
    with writing(state / ".metadata", "wb") as f:
        f.write(buffer.getvalue())
