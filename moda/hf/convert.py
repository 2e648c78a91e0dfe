"""From a checkpoint to a Hugging Face folder and back: names, shapes and settings."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.transformer import TransformerConfig

from moda.checkpoints import STATE, Checkpoint, read_weights, saving_alone
from moda.config.choices import QKNorm
from moda.config.model import ModelConfig
from moda.config.schema import RunConfig
from moda.data import load_tokenizer
from moda.errors import UserError
from moda.files import check_new, read_json, write_json, write_text
from moda.model import ModelTransformerConfig, transformer_config
from moda.placements import NormPlacement
from moda.typed import from_dict, to_dict

from .bundle import bundle
from .card import model_card

__all__ = ["Export", "from_hf", "read_export", "section_of", "to_hf", "write_checkpoint", "write_export"]

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
RUN = "moda_run.json"  # the run's configuration, for the way back
_AUTO_MAP = {
    "AutoConfig": "configuration_moda.MoDAConfig",
    "AutoModel": "modeling_moda.MoDAModel",
    "AutoModelForCausalLM": "modeling_moda.MoDAForCausalLM",
}

#: Modules of a block, ours and exported; norms and what belongs to the depth mechanism keep their names.
_MODULES = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_OUTER = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_PADDED = ("embeddings.weight", "lm_head.w_out.weight")


def _rename(name: str, outer: dict[str, str], modules: dict[str, str], stem: str, to_stem: str) -> str:
    """The name on the other side. ``stem`` is what stands before a block's number: ``blocks.`` or ``model.layers.``"""
    if name in outer:
        return outer[name]
    depth, to_depth = (s.removesuffix("blocks.").removesuffix("layers.") + "depth." for s in (stem, to_stem))
    if name.startswith(depth):
        return to_depth + name.removeprefix(depth)
    match = re.fullmatch(rf"{re.escape(stem)}(\d+)\.(.+)\.(\w+)", name)
    if match is not None:
        index, module, leaf = match.groups()
        if module in modules or module.endswith("_norm") or module.split(".")[0] == "depth":
            return f"{to_stem}{index}.{modules.get(module, module)}.{leaf}"
    raise UserError("checkpoint", "parameters of a model of this project or of OLMo2", name)


def to_hf(weights: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """The weights under their exported names, without rows that only pad the vocabulary."""
    return {
        _rename(name, _OUTER, _MODULES, "blocks.", "model.layers."): (
            w[:vocab_size] if name in _PADDED else w
        ).contiguous()
        for name, w in weights.items()
    }


def from_hf(weights: dict[str, torch.Tensor], rows: int | None = None) -> dict[str, torch.Tensor]:
    """:func:`to_hf` backwards.

    :param rows: rows of the embedding; further ones than the weights have are zero.
    """
    outer, modules = ({v: k for k, v in names.items()} for names in (_OUTER, _MODULES))
    ours = {_rename(n, outer, modules, "model.layers.", "blocks."): w for n, w in weights.items()}
    for name in _PADDED:
        if rows is not None and name in ours and ours[name].shape[0] < rows:
            w = ours[name]
            ours[name] = torch.cat([w, w.new_zeros(rows - w.shape[0], *w.shape[1:])])
    return ours


def _refuse(what: str, got: object) -> UserError:
    return UserError("checkpoint", f"{what}, which an exported model has", got)


def section_of(model: TransformerConfig) -> ModelConfig:
    """The model section of a transformer's config, with its vocabulary.

    :raises UserError: for options of OLMo-core that a model section does not have.
    """
    if isinstance(model, ModelTransformerConfig):
        return dataclasses.replace(model.model, vocab_size=model.vocab_size - model.lm_head.padding)
    block, attention = model.block, None if isinstance(model.block, dict) else model.block.sequence_mixer
    if model.block_overrides or not isinstance(attention, AttentionConfig) or isinstance(block, dict):
        raise _refuse("one kind of block with attention", type(block).__name__)
    placements = {p.olmo_core_block: p() for p in NormPlacement.known.values() if p.olmo_core_block is not None}
    if str(block.name) not in placements:
        raise _refuse(f"a block of type {', '.join(placements)}", block.name)
    for option in (
        "gate", "clip_qkv", "sliding_window", "scalable_softmax", "attention_sinks", "qk_norm_per_head_gains",
    ):  # fmt: skip
        if getattr(attention, option, None):
            raise _refuse(f"attention without {option}", option)
    rope, norm, ffn = attention.rope, block.layer_norm, block.feed_forward
    if rope is None or rope.scaling is not None or str(rope.name) != "default":
        raise _refuse("the default rotary embedding without scaling", rope)
    if norm is None or norm.name != LayerNormType.rms or norm.bias or ffn is None:
        raise _refuse("RMSNorm without bias and a feed-forward", norm)
    biases = {attention.bias is not False, ffn.bias is not False}
    if len(biases) > 1 or model.lm_head.bias is not False:
        raise _refuse("biases on all linears of the blocks or on none, and none on the head", biases)
    return ModelConfig(
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        ffn_hidden_size=ffn.hidden_size,
        vocab_size=model.vocab_size,
        tie_embeddings=model.tie_word_embeddings,
        norm_placement=placements[str(block.name)],
        qk_norm=QKNorm.none
        if attention.qk_norm is None
        else (QKNorm.head if attention.use_head_qk_norm else QKNorm.full),
        bias=biases.pop(),
        norm_eps=float(norm.eps or 1e-5),
        rope_theta=rope.theta,
    )


def _write_tokenizer(checkpoint: Checkpoint, out: Path, length: int) -> dict[str, int]:
    """``tokenizer.json`` and its settings, where the tokenizer's file is at hand; its special ids."""
    if checkpoint.tokenizer is None:
        log.warning("the checkpoint names no tokenizer: none is exported")
        return {}
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    ids = {"eos_token_id": tokenizer.config.eos_token_id, "pad_token_id": tokenizer.config.pad_token_id}
    if tokenizer.path is None:
        log.warning("the file of tokenizer %s is not at hand: copy its tokenizer.json to %s", tokenizer.name, out)
        return ids
    shutil.copyfile(tokenizer.path, out / "tokenizer.json")
    loaded = tokenizer.load()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "eos_token": loaded.id_to_token(ids["eos_token_id"]),
        "pad_token": loaded.id_to_token(ids["pad_token_id"]),
    }
    write_json(out / "tokenizer_config.json", settings)
    return ids


def _check_weights(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are not the model's, or not finite."""
    model = checkpoint.model.build(init_device="meta")
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in expected.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            got = tuple(weights[name].shape) if name in weights else "none"
            raise UserError("checkpoint", f"{name} {shape}, as {checkpoint.folder / 'config.json'} describes", got)
        if not weights[name].isfinite().all():
            raise UserError("checkpoint", "finite weights", f"{name} with NaN or infinity")


def write_export(
    checkpoint: Checkpoint, out: Path, dtype: torch.dtype = torch.float32, evaluation: str | None = None
) -> ModelConfig:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` loads.

    The folder appears whole or not at all.

    :param evaluation: tables of the checkpoint's results, for the model card.

    :raises UserError: for a folder that is not empty, or a model that cannot be exported.
    """
    from safetensors.torch import save_file

    check_new(out)
    length = checkpoint.sequence_length or 4096
    section = section_of(checkpoint.model)
    assert section.vocab_size is not None
    native = read_weights(checkpoint.folder)
    _check_weights(checkpoint, native)
    weights = to_hf(native, section.vocab_size)
    if section.tie_embeddings:
        weights.pop("lm_head.weight", None)
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file({n: w.to(dtype) for n, w in weights.items()}, str(scratch / WEIGHTS), metadata={"format": "pt"})
        ids = _write_tokenizer(checkpoint, scratch, length)
        config = {
            "architectures": ["MoDAForCausalLM"],
            "model_type": "moda",
            "auto_map": _AUTO_MAP,
            "dtype": str(dtype).removeprefix("torch."),
            "model": to_dict(section),
            "max_position_embeddings": length,
            "bos_token_id": None,
            **ids,
        }
        write_json(scratch / "config.json", config)
        (scratch / WEIGHTS).chmod((scratch / "config.json").stat().st_mode)  # safetensors makes it the owner's alone
        write_json(scratch / "generation_config.json", {"bos_token_id": None, **ids})
        if checkpoint.kind == "moda":
            write_json(scratch / RUN, checkpoint.settings)
        card = model_card(checkpoint, section, sum(w.numel() for w in weights.values()), config["dtype"], evaluation)
        write_text(scratch / "README.md", card)
        for name, text in bundle().items():
            write_text(scratch / name, text)
        if out.is_dir():
            out.rmdir()
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return section


@dataclasses.dataclass(frozen=True)
class Export:
    """An exported folder.

    :param model: its model section.
    :param sequence_length: tokens of the sequences that the model was trained on.
    :param weights: under their exported names.
    :param config: the whole ``config.json``.
    """

    model: ModelConfig
    sequence_length: int
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]


def read_export(folder: Path) -> Export:
    """Read an exported folder, without running its code.

    :raises UserError: for a folder that is no export of this project.
    """
    from safetensors.torch import load_file

    expected = f"an export of this project with config.json and {WEIGHTS}"
    config = read_json(folder / "config.json", "folder")
    if config.get("model_type") != "moda" or not isinstance(config.get("model"), dict):
        raise UserError("folder", expected, str(folder), "config.json has no model section of model_type moda")
    section = from_dict(ModelConfig, config["model"], "model")
    length = config.get("max_position_embeddings")
    try:
        weights = load_file(str(folder / WEIGHTS))
    except Exception as e:  # safetensors raises its own kinds on damaged files
        raise UserError("folder", expected, str(folder), str(e).split("\n")[0]) from None
    return Export(section, length if isinstance(length, int) and length > 0 else 4096, weights, config)


def _run_settings(folder: Path, out: Path, export: Export) -> RunConfig:
    """The run's configuration as it was exported, or the least that describes the model."""
    if (folder / RUN).is_file():
        try:
            run = from_dict(RunConfig, read_json(folder / RUN, RUN))
            if section_of(transformer_config(run.model, export.model.vocab_size)) == export.model:
                return run
            log.warning("%s does not describe the model of config.json: left out", folder / RUN)
        except UserError as e:
            log.warning("%s is left out: %s", folder / RUN, e)
    file = out / "tokenizer.json"
    tokenizer = {
        "identifier": str(file) if (folder / "tokenizer.json").is_file() else "unknown",
        "vocab_size": export.model.vocab_size,
        "eos_token_id": export.config.get("eos_token_id") or 0,
        "pad_token_id": export.config.get("pad_token_id"),
    }
    data = {"paths": ["none"], "tokenizer": tokenizer}
    train = {"sequence_length": export.sequence_length, "max_steps": 1}
    sections = {"model": to_dict(export.model), "data": data, "train": train}
    return from_dict(RunConfig, {"name": folder.resolve().name, **sections})


def write_checkpoint(folder: Path, out: Path) -> RunConfig:
    """Import an exported folder: a checkpoint with the model's weights, for evaluation, generation and export.

    It has neither optimizer nor trainer state, so that training cannot resume from it.

    :raises UserError: for a folder that is no export of this project, or an ``out`` that is not empty.
    """
    from olmo_core.distributed.checkpoint import save_state_dict

    check_new(out)
    export = read_export(folder)
    run = _run_settings(folder, out, export)
    rows = run.model.rows(export.model.vocab_size)
    state = {f"model.{name}": w.float() for name, w in from_hf(export.weights, rows).items()}
    out.mkdir(parents=True, exist_ok=True)
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    with saving_alone():
        save_state_dict(str(out / STATE), state)
    write_json(out / "config.json", to_dict(run))
    return run
