"""From a checkpoint to a Hugging Face folder and back: names, shapes and settings."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

from moda.checkpoints import STATE, Checkpoint, read_weights
from moda.config.schema import RunConfig
from moda.config.typed import from_dict, to_dict
from moda.data import load_tokenizer
from moda.errors import UserError
from moda.model import MoDABlockConfig, MoDATransformerConfig

__all__ = ["ModelFields", "fields_of", "from_hf", "read_export", "to_hf", "write_checkpoint", "write_export"]

log = logging.getLogger(__name__)

CODE = ("configuration_moda.py", "decoder_moda.py", "modeling_moda.py")
WEIGHTS = "model.safetensors"
RUN = "moda_run.json"  # the run's configuration, for the way back
_AUTO_MAP = {
    "AutoConfig": "configuration_moda.MoDAConfig",
    "AutoModel": "modeling_moda.MoDAModel",
    "AutoModelForCausalLM": "modeling_moda.MoDAForCausalLM",
}


@dataclass(frozen=True)
class ModelFields:
    """The model's settings as an exported ``config.json`` names them (see ``configuration_moda.py``)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_base: float
    max_position_embeddings: int
    norm_placement: str
    qk_norm: str
    use_bias: bool
    depth_attention: str | None
    depth_ffn: bool
    depth_key_norm: str
    depth_rope: str
    depth_slots: int | None
    tie_word_embeddings: bool


_NAMES: tuple[tuple[str, str], ...] = (  # ours, theirs, inside a block
    ("attention.w_q", "self_attn.q_proj"),
    ("attention.w_k", "self_attn.k_proj"),
    ("attention.w_v", "self_attn.v_proj"),
    ("attention.w_out", "self_attn.o_proj"),
    ("attention.q_norm", "self_attn.q_norm"),
    ("attention.k_norm", "self_attn.k_norm"),
    ("attention.depth_projection.w_k", "self_attn.depth_proj.k_proj"),
    ("attention.depth_projection.w_v", "self_attn.depth_proj.v_proj"),
    ("ffn_depth_projection.w_k", "ffn_depth_proj.k_proj"),
    ("ffn_depth_projection.w_v", "ffn_depth_proj.v_proj"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("attention_norm", "attention_norm"),
    ("feed_forward_norm", "feedforward_norm"),
    ("post_attention_norm", "post_attention_norm"),
    ("post_feed_forward_norm", "post_feedforward_norm"),
)
_OUTER = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_PADDED = ("embeddings.weight", "lm_head.w_out.weight")


def _rename(name: str, outer: dict[str, str], inner: dict[str, str], blocks: tuple[str, str]) -> str:
    if name in outer:
        return outer[name]
    match = re.fullmatch(rf"{re.escape(blocks[0])}\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match.group(2) not in inner:
        raise UserError("checkpoint", "parameters of a MoDA or OLMo2 model", name)
    return f"{blocks[1]}.{match.group(1)}.{inner[match.group(2)]}.{match.group(3)}"


def to_hf(weights: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """The weights under their exported names, without rows that only pad the vocabulary."""
    inner = dict(_NAMES)
    return {
        _rename(name, _OUTER, inner, ("blocks", "model.layers")): (
            w[:vocab_size] if name in _PADDED else w
        ).contiguous()
        for name, w in weights.items()
    }


def from_hf(weights: dict[str, torch.Tensor], rows: int | None = None) -> dict[str, torch.Tensor]:
    """:func:`to_hf` backwards.

    :param rows: rows of the embedding; further ones than the weights have are zero.
    """
    outer, inner = {v: k for k, v in _OUTER.items()}, {theirs: ours for ours, theirs in _NAMES}
    found = {_rename(n, outer, inner, ("model.layers", "blocks")): w for n, w in weights.items()}
    for name in _PADDED:
        if rows is not None and name in found and found[name].shape[0] < rows:
            w = found[name]
            found[name] = torch.cat([w, w.new_zeros(rows - w.shape[0], *w.shape[1:])])
    return found


def _refuse(what: str, got: object) -> UserError:
    return UserError("checkpoint", f"{what}, which an exported model has", got)


def fields_of(model: TransformerConfig, max_position_embeddings: int) -> ModelFields:
    """The exported settings of a model's config.

    :raises UserError: for options of OLMo-core that the exported model does not have.
    """
    block, attention = model.block, None if isinstance(model.block, dict) else model.block.sequence_mixer
    if model.block_overrides or not isinstance(attention, AttentionConfig) or isinstance(block, dict):
        raise _refuse("one kind of block with attention", type(block).__name__)
    if isinstance(block, MoDABlockConfig):
        placement = block.norm_placement.value
    else:
        known = {
            TransformerBlockType.default: "pre",
            TransformerBlockType.reordered_norm: "reordered",
            TransformerBlockType.peri_norm: "peri",
        }
        if block.name not in known:
            raise _refuse("a default, reordered_norm or peri_norm block", block.name)
        placement = known[block.name]
    for option in (
        "gate",
        "clip_qkv",
        "sliding_window",
        "scalable_softmax",
        "attention_sinks",
        "qk_norm_per_head_gains",
    ):
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
    padding = getattr(model.lm_head, "padding", 0)
    depth = model.depth_kv if isinstance(model, MoDATransformerConfig) else None
    qk_norm = "none" if attention.qk_norm is None else ("head" if attention.use_head_qk_norm else "full")
    return ModelFields(
        vocab_size=model.vocab_size - padding,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads or attention.n_heads,
        head_dim=attention.head_dim or model.d_model // attention.n_heads,
        intermediate_size=ffn.hidden_size,
        rms_norm_eps=float(norm.eps or 1e-5),
        rope_base=float(rope.theta),
        max_position_embeddings=max_position_embeddings,
        norm_placement=placement,
        qk_norm=qk_norm,
        use_bias=biases.pop(),
        depth_attention=None if depth is None else depth.attention.value,
        depth_ffn=depth is not None and depth.ffn,
        depth_key_norm="none" if depth is None else depth.key_norm.value,
        depth_rope="none" if depth is None else depth.rope.value,
        depth_slots=None if depth is None else depth.slots,
        tie_word_embeddings=model.tie_word_embeddings,
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
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return ids


def write_export(checkpoint: Checkpoint, out: Path, dtype: torch.dtype = torch.float32) -> ModelFields:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` loads.

    The folder appears whole or not at all.

    :raises UserError: for a folder that is not empty, or a model that cannot be exported.
    """
    from safetensors.torch import save_file

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("OUT", "a new or empty folder", str(out))
    length = checkpoint.sequence_length or 4096
    fields = fields_of(checkpoint.model, length)
    weights = to_hf(read_weights(checkpoint.folder), fields.vocab_size)
    if fields.tie_word_embeddings:
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
            **asdict(fields),
            "bos_token_id": None,
            **ids,
        }
        (scratch / "config.json").write_text(json.dumps(config, indent=1))
        (scratch / "generation_config.json").write_text(json.dumps({"bos_token_id": None, **ids}, indent=1))
        if checkpoint.kind == "moda":
            (scratch / RUN).write_text(json.dumps(checkpoint.settings, indent=1))
        for name in CODE:
            shutil.copyfile(Path(__file__).with_name(name), scratch / name)
        if out.is_dir():
            out.rmdir()
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return fields


def read_export(folder: Path) -> tuple[ModelFields, dict[str, torch.Tensor], dict[str, Any]]:
    """An exported folder's settings, weights and whole ``config.json``, without running its code.

    :raises UserError: for a folder that is no export of this project.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] != "moda":
            raise KeyError("model_type")
        fields = from_dict(ModelFields, {k: v for k, v in config.items() if k in ModelFields.__dataclass_fields__})
        weights = load_file(str(folder / WEIGHTS))
    except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(
            "folder", f"an export of this project with config.json and {WEIGHTS}", str(folder), str(e)
        ) from None
    return fields, weights, config


def _run_settings(folder: Path, out: Path, fields: ModelFields, config: dict[str, Any]) -> RunConfig:
    """The run's configuration as it was exported, or the least that describes the model."""
    if (folder / RUN).is_file():
        try:
            run = from_dict(RunConfig, json.loads((folder / RUN).read_text()))
            model = run.model.transformer(run.model.vocab_size or fields.vocab_size)
            if fields_of(model, fields.max_position_embeddings) == fields:
                return run
            log.warning("%s does not describe the model of config.json: left out", folder / RUN)
        except (UserError, json.JSONDecodeError, UnicodeDecodeError) as e:
            log.warning("%s is left out: %s", folder / RUN, e)
    depth = None
    if fields.depth_attention is not None:
        depth = {
            "attention": fields.depth_attention,
            "ffn": fields.depth_ffn,
            "key_norm": fields.depth_key_norm,
            "rope": fields.depth_rope,
            "slots": fields.depth_slots,
        }
    section = {
        "d_model": fields.hidden_size,
        "n_layers": fields.num_hidden_layers,
        "n_heads": fields.num_attention_heads,
        "n_kv_heads": fields.num_key_value_heads,
        "head_dim": fields.head_dim,
        "ffn_hidden_size": fields.intermediate_size,
        "vocab_size": fields.vocab_size,
        "tie_embeddings": fields.tie_word_embeddings,
        "norm_placement": fields.norm_placement,
        "qk_norm": fields.qk_norm,
        "bias": fields.use_bias,
        "norm_eps": fields.rms_norm_eps,
        "rope_theta": fields.rope_base,
        "depth_kv": depth,
    }
    file = out / "tokenizer.json"
    tokenizer = {
        "identifier": str(file) if (folder / "tokenizer.json").is_file() else "unknown",
        "vocab_size": fields.vocab_size,
        "eos_token_id": config.get("eos_token_id") or 0,
        "pad_token_id": config.get("pad_token_id"),
    }
    data = {"paths": ["none"], "tokenizer": tokenizer}
    train = {"sequence_length": fields.max_position_embeddings, "max_steps": 1, "save_folder": str(out.parent)}
    return from_dict(RunConfig, {"name": folder.resolve().name, "model": section, "data": data, "train": train})


def write_checkpoint(folder: Path, out: Path) -> RunConfig:
    """Import an exported folder: a checkpoint with the model's weights, for evaluation, generation and export.

    It has neither optimizer nor trainer state, so that training cannot resume from it.

    :raises UserError: for a folder that is no export of this project, or an ``out`` that is not empty.
    """
    from olmo_core.distributed.checkpoint import save_state_dict

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("OUT", "a new or empty folder", str(out))
    fields, weights, config = read_export(folder)
    run = _run_settings(folder, out, fields, config)
    rows = run.model.transformer(run.model.vocab_size or fields.vocab_size).vocab_size
    state = {f"model.{name}": w.float() for name, w in from_hf(weights, rows).items()}
    out.mkdir(parents=True, exist_ok=True)
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    save_state_dict(str(out / STATE), state)
    (out / "config.json").write_text(json.dumps(to_dict(run), indent=1))
    return run
