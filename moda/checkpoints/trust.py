"""What in a checkpoint can name code: the table of contents ``.metadata``, which is a pickle, and ``config.json`` of OLMo-core,
which names classes. Both are read here by something that knows only the few harmless names they need.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from moda.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_TABLE = {
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

#: Configuration dataclasses of which OLMo-core's transformers consist. Constructing one stores its fields and nothing else.
_CONFIGS = {
    f"olmo_core.nn.{name}"
    for name in (
        "transformer.config.TransformerConfig", "transformer.config.TransformerBlockConfig", "attention.AttentionConfig",
        "attention.GateConfig", "attention.SlidingWindowAttentionConfig", "attention.recurrent.GatedDeltaNetConfig",
        "attention.kda.KimiDeltaAttentionConfig", "feed_forward.FeedForwardConfig", "layer_norm.LayerNormConfig",
        "lm_head.LMHeadConfig", "moe.moe.MoEConfig", "moe.moe.LatentMoEConfig", "moe.router.MoERouterConfig",
        "rope.RoPEConfig", "rope.ABFRoPEScalingConfig", "rope.PIRoPEScalingConfig", "rope.StepwiseRoPEScalingConfig",
        "rope.YaRNRoPEScalingConfig",
    )
}  # fmt: skip


class _TableUnpickler(pickle.Unpickler):
    """Reads a checkpoint's table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _TABLE:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's table needs")


def read_table(folder: Path) -> Metadata:
    """The table of contents of ``model_and_optim/``.

    :raises UserError: for a folder that has none, and for a table that is damaged or names anything else than a table's classes.
    """
    file = folder / ".metadata"
    if not file.is_file():
        raise UserError("checkpoint", f"a checkpoint folder with {folder.name}/.metadata", str(folder.parent))
    try:
        table = _TableUnpickler(io.BytesIO(file.read_bytes())).load()
        if not (isinstance(table.state_dict_metadata, dict) and isinstance(table.storage_data, dict)):
            raise TypeError("it is no table")
    except Exception as e:  # whatever a damaged or forged pickle raises
        raise UserError("checkpoint", f"a readable table of contents {file}", hint=str(e) or type(e).__name__) from None
    return table


def check_path(folder: Path, name: Any) -> Path:
    """A file that a table of contents names, which may be a link (as in a hub's cache) but is inside the folder.

    :raises UserError: for an absolute name, and one that leads out of the folder.
    """
    if not isinstance(name, str) or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise UserError("checkpoint", f"files inside {folder}", name)
    return folder / name


def objects(data: Any) -> Iterator[dict[str, Any]]:
    """Every object in JSON data, outer ones first. However deep: there is no recursion."""
    stack = [data]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
        if isinstance(node, (dict, list)):
            stack += reversed(list(node.values() if isinstance(node, dict) else node))


def check_classes(file: Path, model: dict[str, Any]) -> None:
    """Refuse a configuration of OLMo-core that names anything but the configurations of a transformer's parts.

    OLMo-core's decoder calls whatever ``_CLASS_`` names.

    :raises UserError: naming the class.
    """
    for node in objects(model):
        name = node.get("_CLASS_")
        if "_CLASS_" in node and not (isinstance(name, str) and name in _CONFIGS):
            raise UserError(
                "checkpoint", f"classes of OLMo-core that a transformer's configuration needs in {file}", name
            )
