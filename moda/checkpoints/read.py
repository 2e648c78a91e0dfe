"""A checkpoint's weights and model, read without running anything that the folder brings along.

Distributed checkpoints keep their table of contents as a pickle. It is read by an unpickler that knows only the handful of
harmless classes such a table consists of, and the tensors by ``torch.load(weights_only=True)``: a folder from a stranger
cannot execute code. The optimizer's state and the trainer's (``train/``) are not touched.
"""

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olmo_core.nn.transformer import Transformer, TransformerConfig
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moda.config.schema import TokenizerSection
from moda.data import load_tokenizer
from moda.errors import UserError
from moda.files import read_json
from moda.model import transformer_config
from moda.typed import from_dict

from .find import CONFIG, STATE, Kind, kind_of
from .seal import CHECKSUMS, differences
from .settings import saved_model
from .trust import check_classes, check_path, objects, read_table

_PREFIX = "model."
_TIED = "lm_head.w_out.weight"
#: How the names of scores of slots end.
SCORES = ".depth.scores"


def _read_shard(folder: Path, entry: Any, name: str) -> torch.Tensor:
    path = check_path(folder, entry.relative_path)
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


def read_weights(folder: Path, only: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, whole, on the CPU, by parameter name.

    :param folder: a checkpoint (``stepN``), saved by any number of processes. Where it has checksums they are checked first.
    :param only: which parameters to read, by name.

    :raises UserError: for a folder that is no checkpoint, or a damaged one.
    """
    state = folder / STATE
    if (folder / CHECKSUMS).is_file() and (reason := differences(folder, f"{STATE}/")) is not None:
        raise UserError("checkpoint", f"a whole checkpoint in {folder}", reason)
    table = read_table(state)
    try:
        weights = _assemble(state, table, only)
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:  # sizes or offsets that cannot be
        reason = str(e).split("\n")[0][:200]
        raise UserError("checkpoint", f"a readable table of contents {state / '.metadata'}", hint=reason) from None
    if not weights:
        raise UserError("checkpoint", f"model weights in {state}", "none")
    return weights


def _assemble(state: Path, table: Metadata, only: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    shards: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for index, entry in (table.storage_data or {}).items():
        if index.fqn.startswith(_PREFIX):
            shards[index.fqn].append((index, entry))
    weights: dict[str, torch.Tensor] = {}
    for name, meta in table.state_dict_metadata.items():
        if not name.startswith(_PREFIX) or not isinstance(meta, TensorStorageMetadata):
            continue
        if not only(name.removeprefix(_PREFIX)):
            continue
        whole = torch.empty(meta.size, dtype=meta.properties.dtype)
        covered = torch.zeros(meta.size, dtype=torch.bool)
        for index, entry in shards[name]:
            part = _read_shard(state, entry, name)
            target, seen = whole, covered
            for dim, (offset, size) in enumerate(zip(index.offset or [0] * part.ndim, part.shape)):
                target, seen = target.narrow(dim, offset, size), seen.narrow(dim, offset, size)
            target.copy_(part)
            seen.fill_(True)
        if not covered.all():  # counted by place: parts that overlap leave others as memory happened to be
            got = f"{int(covered.sum())} of {whole.numel()} values"
            raise UserError("checkpoint", f"all of {name} in {state.parent}", got)
        weights[name[len(_PREFIX) :]] = whole
    return weights


def embedding_rows(folder: Path) -> int | None:
    """How many tokens a checkpoint's embedding has rows for, None where its table of contents does not tell."""
    size = getattr(read_table(folder / STATE).state_dict_metadata.get(f"{_PREFIX}embeddings.weight"), "size", None)
    return size[0] if isinstance(size, torch.Size) and size else None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder says about itself; its weights are not read yet.

    :param folder: the folder.
    :param kind: ``moda`` or ``olmo-core`` (:func:`.kind_of`).
    :param model: the model's config.
    :param tokenizer: the run's tokenizer, or None where the folder does not tell.
    :param sequence_length: what the model was trained on, or None.
    :param settings: the plain contents of ``config.json``.
    """

    folder: Path
    kind: Kind
    model: TransformerConfig
    tokenizer: TokenizerSection | None
    sequence_length: int | None
    settings: dict[str, Any]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json`` of a checkpoint of this project or of OLMo-core.

    :raises UserError: for a folder that is neither, or a configuration that cannot be understood.
    """
    kind = kind_of(folder)
    file = folder / CONFIG
    if kind not in ("moda", "olmo-core"):
        raise UserError(
            "checkpoint", f"a folder with {CONFIG} and {STATE}/", str(folder), "this is a Hugging Face folder"
        )
    settings = read_json(file, "checkpoint")
    model = settings["model"]
    if kind == "olmo-core":
        length = next((n for o in objects(settings) if isinstance(n := o.get("sequence_length"), int) and n > 0), None)
        return Checkpoint(folder, kind, _olmo_core_config(file, model), _find_tokenizer(settings), length, settings)
    # Only what describes the model: a key of another section that has since been renamed does not matter here.
    architecture = saved_model(folder, settings)
    data, train = (s if isinstance(s := settings.get(name), dict) else {} for name in ("data", "train"))
    named = data.get("tokenizer") or "dolma2"
    tokenizer = from_dict(
        TokenizerSection, {"identifier": named} if isinstance(named, str) else named, "data.tokenizer"
    )
    vocab = architecture.vocab_size
    if vocab is None:
        vocab = load_tokenizer(tokenizer).config.vocab_size
    length = train.get("sequence_length")
    length = length if isinstance(length, int) and length > 0 else None
    return Checkpoint(folder, kind, transformer_config(architecture, vocab), tokenizer, length, settings)


def _olmo_core_config(file: Path, model: dict[str, Any]) -> TransformerConfig:
    check_classes(file, model)
    try:
        config = TransformerConfig.from_dict(model)
    except Exception as e:  # its decoder raises many kinds
        raise UserError("checkpoint", f"a transformer of OLMo-core in {file}", hint=str(e).split("\n")[0]) from None
    if not isinstance(config, TransformerConfig):
        raise UserError("checkpoint", f"a transformer of OLMo-core in {file}", type(config).__name__)
    return config


def _find_tokenizer(settings: dict[str, Any]) -> TokenizerSection | None:
    """The first tokenizer described anywhere in an OLMo-core configuration."""
    for node in objects(settings):
        if {"identifier", "vocab_size", "eos_token_id"} <= set(node) and node["identifier"]:
            keys = ("identifier", "vocab_size", "eos_token_id", "pad_token_id")
            section = {key: node.get(key) for key in keys} | {"hub": node["identifier"]}
            return from_dict(TokenizerSection, section, "tokenizer")
    return None


def load_model(
    checkpoint: Checkpoint, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model with its weights, in evaluation mode.

    :raises UserError: where the weights are not those of the model that ``config.json`` describes.
    """
    model = checkpoint.model.build(init_device="meta")
    weights = match_weights(checkpoint.folder, model)
    # Every parameter is replaced below; to_empty also gives the tied pair one storage again.
    model.to_empty(device=torch.device("cpu"))
    if model.tie_word_embeddings:
        model.lm_head.w_out.weight = model.embeddings.weight  # type: ignore[union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.to(device=device or torch.device("cpu"), dtype=dtype).eval()


def match_weights(folder: Path, model: Transformer, *, other_reads: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint's weights (:func:`read_weights`) for the parameters of a model; of a tied pair the embedding alone.

    :param model: on any device, ``meta`` too.
    :param other_reads: whether the model's layers may read other slots. Projections of slots that only the checkpoint has are
        then left out, and so are scores unless both have the same.

    :raises UserError: where the weights are not those of the model.
    """
    weights = read_weights(folder)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if model.tie_word_embeddings:
        expected.pop(_TIED, None)
        weights.pop(_TIED, None)
    if other_reads:
        for name in [n for n, w in weights.items() if ".depth." in n and expected.get(n) != tuple(w.shape)]:
            if name not in expected or name.endswith(SCORES):
                weights.pop(name)
        expected = {n: shape for n, shape in expected.items() if n in weights or not n.endswith(SCORES)}
    saved = {name: tuple(w.shape) for name, w in weights.items()}
    for name in sorted({*expected, *saved}):
        if expected.get(name) != saved.get(name):
            raise UserError(
                "checkpoint", f"the weights of the model that {folder / CONFIG} describes ({name} {expected.get(name)})",
                f"{name} {saved.get(name)}",
            )  # fmt: skip
    return weights
