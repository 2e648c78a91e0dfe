"""A checkpoint's weights and model, read without running anything that the folder brings along.

Distributed checkpoints keep their table of contents as a pickle. Here it is read by an unpickler that knows only the handful
of harmless classes such a table consists of, and the tensors by ``torch.load(weights_only=True)``: a folder from a stranger
cannot execute code. The optimizer's state and the trainer's (``train/``) are not touched.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olmo_core.nn.transformer import Transformer, TransformerConfig

from moda.config.schema import ModelConfig, TokenizerSection
from moda.errors import UserError
from moda.model import transformer_config
from moda.typed import from_dict

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "read_weights"]

STATE = "model_and_optim"
_PREFIX = "model."

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}  # fmt: skip


class _TableUnpickler(pickle.Unpickler):
    """Reads a checkpoint's table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's table needs")


def _read_table(folder: Path) -> Any:
    file = folder / ".metadata"
    if not file.is_file():
        raise UserError("checkpoint", f"a checkpoint folder with {STATE}/.metadata", str(folder.parent))
    try:
        return _TableUnpickler(io.BytesIO(file.read_bytes())).load()
    except Exception as e:  # whatever a damaged or forged pickle raises
        raise UserError("checkpoint", f"a readable table of contents {file}", hint=str(e) or type(e).__name__) from None


def _read_shard(folder: Path, entry: Any, name: str) -> torch.Tensor:
    path = folder / entry.relative_path
    if folder.resolve() not in path.resolve().parents:
        raise UserError("checkpoint", f"files inside {folder}", entry.relative_path)
    try:
        with path.open("rb") as f:
            f.seek(entry.offset)
            data = f.read(entry.length)
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many kinds on damaged bytes
        reason = str(e).split("\n")[0] or type(e).__name__
        raise UserError(
            "checkpoint", f"a whole checkpoint in {folder.parent}", f"{name} cannot be read", reason
        ) from None
    if not isinstance(tensor, torch.Tensor):
        raise UserError("checkpoint", f"a tensor for {name} in {path}", type(tensor).__name__)
    return tensor


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, whole, on the CPU, by parameter name.

    :param folder: a checkpoint (``stepN``), saved by any number of processes. Where it has checksums they are checked first.

    :raises UserError: for a folder that is no checkpoint, or a damaged one.
    """
    from moda.train.checkpoints import CHECKSUMS, damage

    state = folder / STATE
    if (folder / CHECKSUMS).is_file() and (reason := damage(folder)) is not None:
        raise UserError("checkpoint", f"a whole checkpoint in {folder}", reason)
    table = _read_table(state)
    shards: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for index, entry in table.storage_data.items():
        if index.fqn.startswith(_PREFIX):
            shards[index.fqn].append((index, entry))
    weights: dict[str, torch.Tensor] = {}
    for name, meta in table.state_dict_metadata.items():
        if not name.startswith(_PREFIX) or not hasattr(meta, "chunks"):
            continue
        whole = torch.empty(meta.size, dtype=meta.properties.dtype)
        covered = 0
        for index, entry in shards[name]:
            part = _read_shard(state, entry, name)
            target = whole
            for dim, (offset, size) in enumerate(zip(index.offset or [0] * part.ndim, part.shape)):
                target = target.narrow(dim, offset, size)
            target.copy_(part)
            covered += part.numel()
        if covered != whole.numel():
            raise UserError("checkpoint", f"all of {name} in {folder}", f"{covered} of {whole.numel()} values")
        weights[name[len(_PREFIX) :]] = whole
    if not weights:
        raise UserError("checkpoint", f"model weights in {state}", "none")
    return weights


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says about itself; its weights are not read yet.

    :param folder: the folder.
    :param kind: ``moda`` (a run of this project) or ``olmo-core`` (a run of OLMo-core's own scripts).
    :param model: the model's config.
    :param tokenizer: the run's tokenizer, or None where the folder does not tell.
    :param sequence_length: what the model was trained on, or None.
    :param settings: the plain contents of ``config.json``.
    """

    folder: Path
    kind: str
    model: TransformerConfig
    tokenizer: TokenizerSection | None
    sequence_length: int | None
    settings: dict[str, Any]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json`` of a checkpoint of this project or of OLMo-core.

    :raises UserError: for a folder that is neither, or a configuration that cannot be understood.
    """
    from moda.data import load_tokenizer

    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError("checkpoint", "an existing checkpoint folder (stepN)", str(folder))
    if not file.is_file() or not (folder / STATE).is_dir():
        steps = sorted(p.name for p in folder.glob("step*") if p.is_dir())
        hint = f"it has {', '.join(steps[-3:])}" if steps else None
        raise UserError("checkpoint", f"a folder with config.json and {STATE}/", str(folder), hint)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        model = settings["model"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise UserError("checkpoint", f"a readable {file} with a model", hint=str(e)) from None
    if "block" in model or "_CLASS_" in model:
        found = _find_tokenizer(settings)
        length = _find_value(settings, "sequence_length")
        config = _olmo_core_config(file, model)
        return Checkpoint(folder, "olmo-core", config, found, length, settings)
    # Only what describes the model: a key of another section that has since been renamed does not matter here.
    architecture = from_dict(ModelConfig, model, "model")
    named = (settings.get("data") or {}).get("tokenizer") or "dolma2"
    section = (
        TokenizerSection(named) if isinstance(named, str) else from_dict(TokenizerSection, named, "data.tokenizer")
    )
    vocab = architecture.vocab_size
    if vocab is None:
        vocab = load_tokenizer(section).config.vocab_size
    length = (settings.get("train") or {}).get("sequence_length")
    return Checkpoint(folder, "moda", transformer_config(architecture, vocab), section, length, settings)


def _check_classes(file: Path, node: Any) -> None:
    """A config names classes to instantiate: only OLMo-core's own are."""
    if isinstance(node, dict):
        name = node.get("_CLASS_")
        if name is not None and not str(name).startswith("olmo_core."):
            raise UserError("checkpoint", f"classes of OLMo-core in {file}", str(name))
        for value in node.values():
            _check_classes(file, value)
    elif isinstance(node, list):
        for value in node:
            _check_classes(file, value)


def _olmo_core_config(file: Path, model: dict[str, Any]) -> TransformerConfig:
    _check_classes(file, model)
    try:
        config = TransformerConfig.from_dict(model)
    except Exception as e:  # its decoder raises many kinds
        raise UserError("checkpoint", f"a transformer of OLMo-core in {file}", hint=str(e).split("\n")[0]) from None
    if not isinstance(config, TransformerConfig):
        raise UserError("checkpoint", f"a transformer of OLMo-core in {file}", type(config).__name__)
    return config


def _find_tokenizer(node: Any) -> TokenizerSection | None:
    """The first tokenizer described anywhere in an OLMo-core configuration."""
    if isinstance(node, dict):
        if {"identifier", "vocab_size", "eos_token_id"} <= set(node) and node["identifier"]:
            return TokenizerSection(
                node["identifier"],
                node["vocab_size"],
                node["eos_token_id"],
                node.get("pad_token_id"),
                node["identifier"],
            )
        children = list(node.values())
    else:
        children = node if isinstance(node, list) else []
    return next((found for child in children if (found := _find_tokenizer(child)) is not None), None)


def _find_value(node: Any, key: str) -> int | None:
    if isinstance(node, dict):
        if isinstance(node.get(key), int):
            return node[key]
        node = list(node.values())
    if isinstance(node, list):
        return next((found for child in node if (found := _find_value(child, key)) is not None), None)
    return None


def load_model(
    checkpoint: Checkpoint, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model with its weights, in evaluation mode.

    :raises UserError: where the weights are not those of the model that ``config.json`` describes.
    """
    model = checkpoint.model.build(init_device="meta")
    weights = read_weights(checkpoint.folder)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if model.tie_word_embeddings:
        wanted.pop("lm_head.w_out.weight", None)
        weights.pop("lm_head.w_out.weight", None)
    found = {name: tuple(w.shape) for name, w in weights.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise UserError(
                "checkpoint",
                f"the weights of the model that {checkpoint.folder / 'config.json'} describes ({name} {wanted.get(name)})",
                f"{name} {found.get(name)}",
            )
    # Every parameter is replaced below; to_empty also gives the tied pair one storage again.
    model.to_empty(device=torch.device("cpu"))
    if model.tie_word_embeddings:
        model.lm_head.w_out.weight = model.embeddings.weight  # type: ignore[union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.to(device=device or torch.device("cpu"), dtype=dtype).eval()
