"""A run's configuration as it was saved with a checkpoint, compared with another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moda.config.schema import ModelConfig, RunConfig
from moda.errors import UserError
from moda.files import read_json
from moda.typed import from_dict, to_dict

from .find import CONFIG


def read_settings(folder: Path) -> dict[str, Any]:
    """The resolved configuration saved with a checkpoint, as plain sections.

    :raises UserError: where the folder has none.
    """
    if not (folder / CONFIG).is_file():
        raise UserError("checkpoint", f"a checkpoint of this project, with {CONFIG}", str(folder))
    settings = read_json(folder / CONFIG, "checkpoint")
    if not isinstance(settings.get("model"), dict):
        raise UserError("checkpoint", f"{folder / CONFIG} to have a model section", "none")
    return settings


def saved_model(folder: Path, settings: dict[str, Any]) -> ModelConfig:
    """The model section of a checkpoint's settings.

    :raises UserError: for a checkpoint of a layout that is no longer read, and for a section that cannot be understood.
    """
    model = settings["model"]
    if "depth_kv" in model:
        hint = "saved before version 0.1.0, with other parameter names: use the version that saved it, or train again"
        raise UserError("checkpoint", "a checkpoint with model.depth", f"{folder} with model.depth_kv", hint)
    return from_dict(ModelConfig, model, "model")


def check_same_model(folder: Path, model: ModelConfig, *, other_reads: bool = False) -> None:
    """Refuse a checkpoint of another model before anything of it is loaded.

    :param other_reads: whether it may have been trained under another slot policy, or with slots of another dtype.

    :raises UserError: naming the first setting that differs.
    """
    saved = to_dict(saved_model(folder, read_settings(folder)))
    for key, before, now in differences(saved, to_dict(model), "model"):
        reads = key.startswith("model.depth.read") or key == "model.depth.slot_dtype"
        if key != "model.attention_backend" and not (reads and other_reads):  # the backend changes speed, not the model
            hint = "or choose another train.save_folder"
            if reads:
                hint += "; train.load_path starts from weights of other slots with train.load_other_reads=true"
            raise UserError(key, f"{before!r}, as in checkpoint {folder}", now, hint)


def differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ in two plain configurations, with both values."""
    if isinstance(a, dict) and isinstance(b, dict) and (a.keys() & b.keys() or not key):
        for name in sorted({*a, *b}):
            yield from differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b


#: Settings that a run keeps, beside those of the model, and why. The data are told by their fingerprint.
_KEPT = {
    "optim.name": "its state is that of this optimizer",
    "train.seed": "it has chosen the initial weights and the order of the data",
    "train.sequence_length": "the order of the data is one of sequences",
}
_HARMLESS = ("description", "train.load_path", "train.save_folder")


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to resume with another model or with other settings that could not take effect.

    :raises UserError: naming the first setting that differs.
    """
    check_same_model(folder, config.model)
    hint = "choose another train.save_folder, and train.load_path to start from its weights"
    for key, before, now in differences(read_settings(folder), to_dict(config)):
        if key in _KEPT:
            raise UserError(
                key, f"{before}, as the run in {folder.parent} was begun with", now, f"{_KEPT[key]}: {hint}"
            )
        if key == "train.load_path" and now is not None:
            raise UserError(key, f"{before or 'null'}, as {folder.parent} has a run that is resumed", now, hint)


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """Settings that were changed since a checkpoint was saved and now take effect, as ``key: was -> is``."""
    changes = differences(read_settings(folder), to_dict(config))
    return [f"{key}: {was} -> {now}" for key, was, now in changes if key not in _HARMLESS]
