"""Any model under one small interface: log-probabilities of chosen next tokens."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from moda.checkpoints import choose_checkpoint, kind_of, load_model, open_checkpoint
from moda.config.schema import TokenizerSection
from moda.data import Tokenizer, load_tokenizer
from moda.errors import UserError
from moda.files import read_json

from .shared_prefix import Layout, shared_attention

log = logging.getLogger(__name__)

#: At most so many logits at once (2 GiB in fp32).
MAX_LOGITS = 1 << 29
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TextTokenizer:
    """Text to ids and back. No special token is ever made of text or added to it, as in training data."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.description = tokenizer
        self.eos_token_id = tokenizer.config.eos_token_id
        self._tokenizer = tokenizer.load()
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token is text

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass
class ModelInfo:
    """What is known of a model before its weights are read.

    :param kind: ``moda``, ``olmo-core`` or ``huggingface``.
    :param tokenizer_info: the tokenizer's description (its file is read when text must be encoded), or None.
    :param context_length: tokens that the model was made for.
    :param settings: the configuration that came with the checkpoint.
    """

    label: str
    path: str
    kind: str
    tokenizer_info: Tokenizer | None
    context_length: int
    vocab_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    _tokenizer: TextTokenizer | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer itself; UserError where the checkpoint does not name it or its file cannot be read."""
        if self.tokenizer_info is None:
            expected = "a checkpoint that names its tokenizer"
            raise UserError("checkpoint", expected, self.path, "give one with --tokenizer")
        self._tokenizer = self._tokenizer or TextTokenizer(self.tokenizer_info)
        return self._tokenizer


@dataclass(kw_only=True)
class ScoredModel(ModelInfo):
    """A model that can be asked for log-probabilities.

    :param module: the network; called with ids ``[B, T]`` it gives logits, or an output that has them.
    :param head: the submodule that turns hidden states ``[B, T, d_model]`` into logits, or None if it is not known.
    """

    module: nn.Module
    head: nn.Module | None

    @property
    def ends_with_head(self) -> bool:
        """Whether the head gives the logits as they are. Some Hugging Face models go on to cap or scale them."""
        return self.head is not None and self.kind != "huggingface"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def describe(self) -> dict[str, Any]:
        """What a result says about the model it belongs to."""
        return {
            "label": self.label,
            "path": self.path,
            "kind": self.kind,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "context_length": self.context_length,
            "tokenizer": None if self.tokenizer_info is None else self.tokenizer_info.describe(),
            "config": self.settings,
        }

    def logits(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits ``[B, T, V]`` of ids ``[B, T]``."""
        with torch.no_grad():
            out = self.module(ids, **options)
        return out if isinstance(out, torch.Tensor) else out.logits

    def token_log_probs(
        self, layout: Layout, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability that ``targets[i]`` comes after token ``columns[i]`` of row ``rows[i]``; fp32 ``[N]``.

        The head runs on these N positions only, where it is known, and on no more at once than give 2 GiB of logits where
        it is the model's last step (:attr:`ends_with_head`).

        :param layout: sequences, or trees of them, padded on the right: attention is causal.
        """
        device = self.device
        ids, rows, columns, targets = (  # copied without waiting for what the device is still doing
            t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
            for t in (layout.ids, rows, columns, targets)
        )
        hidden: list[torch.Tensor] = []  # what the head is asked about, [1, N, d_model]

        def pick(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args[0].shape[:2] != ids.shape:
                return None
            hidden.append(args[0][rows, columns][None])
            return (args[0][:1, :1] if self.ends_with_head else hidden[0], *args[1:]), kwargs

        with contextlib.ExitStack() as stack:
            if self.head is not None:
                stack.callback(self.head.register_forward_pre_hook(pick, with_kwargs=True).remove)
            options = {} if layout.is_plain else stack.enter_context(shared_attention(self.module, layout, device))
            logits = self.logits(ids, **options)
        if not hidden or self.head is None:
            return -F.cross_entropy(logits[rows, columns].float(), targets, reduction="none")
        if not self.ends_with_head:
            return -F.cross_entropy(logits[0].float(), targets, reduction="none")
        at_once = max(1, MAX_LOGITS // self.vocab_size)
        with torch.no_grad():
            losses = [
                F.cross_entropy(self.head(part)[0].float(), target, reduction="none")
                for part, target in zip(hidden[0].split(at_once, 1), targets.split(at_once))
            ]
        return -torch.cat(losses)


def checkpoint_label(path: Path) -> str:
    """``<run>-<stepN>`` for a training checkpoint, the folder's name otherwise."""
    path = path.resolve()
    return f"{path.parent.name}-{path.name}" if path.name.startswith("step") else path.name


def choose_device(name: str | None) -> torch.device:
    """The device of ``--device``; a GPU where there is one if None.

    :raises UserError: for a device that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in known:
        raise UserError("--device", f"one of {', '.join(known)}", name)
    return torch.device(name)


def _choose_tokenizer(option: str | None, section: TokenizerSection | None, vocab_size: int) -> Tokenizer | None:
    """The checkpoint's tokenizer (``section``), or the one of ``--tokenizer``, which must be the same one."""
    own = None if section is None else load_tokenizer(section)
    chosen = own if option is None else load_tokenizer(TokenizerSection(option, hub=None if own is None else own.hub))
    if chosen is None:
        return None
    key = "checkpoint" if option is None else "--tokenizer"
    config = chosen.config
    if config.vocab_size > vocab_size:
        expected = f"a tokenizer of at most the {vocab_size:,} tokens that the model knows"
        raise UserError(key, expected, f"{chosen.name} with {config.vocab_size:,}")
    if option is None or own is None or chosen.fingerprint == own.fingerprint:
        return chosen
    same_numbers = (config.vocab_size, config.eos_token_id) == (own.config.vocab_size, own.config.eos_token_id)
    if own.path is not None or not same_numbers:
        expected, got = (
            f"{t.name}, {t.config.vocab_size:,} tokens, document end {t.config.eos_token_id} ({t.fingerprint[:20]})"
            for t in (own, chosen)
        )
        raise UserError(key, f"the tokenizer that the model was trained with: {expected}", got)
    return chosen


#: Reads the weights.
Build = Callable[[torch.device, torch.dtype], Any]


def _open_trained(path: Path, tokenizer: str | None) -> tuple[ModelInfo, Build]:
    checkpoint = open_checkpoint(path)
    vocab = checkpoint.model.vocab_size - getattr(checkpoint.model.lm_head, "padding", 0)
    chosen = _choose_tokenizer(tokenizer, checkpoint.tokenizer, vocab)
    label, length = checkpoint_label(path), checkpoint.sequence_length or 2048
    info = ModelInfo(label, str(path), checkpoint.kind, chosen, length, vocab, checkpoint.settings)
    return info, partial(load_model, checkpoint)


def _open_huggingface(path: Path, tokenizer: str | None, settings: dict[str, Any]) -> tuple[ModelInfo, Build]:
    try:
        import transformers
    except ImportError:
        hint = "pip install -e '.[hf]'"
        raise UserError("checkpoint", "transformers, to load a Hugging Face folder", hint=hint) from None
    if not list(path.glob("*.safetensors")):
        raise UserError("checkpoint", "weights in safetensors (pickles are not read)", str(path))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from moda.hf import register

    register()  # a folder exported by this project is read by this project's classes, never by the code in the folder
    safe: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)

    def read(loader: Any, **options: Any) -> Any:
        try:
            return loader.from_pretrained(path, **safe, **options)
        except Exception as e:  # transformers raises many kinds
            expected = f"a causal language model that transformers loads from {path}"
            raise UserError("checkpoint", expected, hint=" ".join(str(e).split())[:200]) from None

    def build(device: torch.device, dtype: torch.dtype) -> Any:
        module = read(transformers.AutoModelForCausalLM, dtype=dtype, use_safetensors=True).to(device).eval()
        module.config.use_cache = False
        return module

    config = read(transformers.AutoConfig).get_text_config()
    section = TokenizerSection(str(path)) if (path / "tokenizer.json").is_file() else None
    vocab: Any
    length: Any
    vocab, length = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None) or 2048
    for name, size in (("vocab_size", vocab), ("max_position_embeddings", length)):
        if not isinstance(size, int) or size < 1:
            raise UserError("checkpoint", f"an integer >= 1 for {name} in {path / 'config.json'}", size)
    chosen = _choose_tokenizer(tokenizer, section, vocab)
    return ModelInfo(checkpoint_label(path), str(path), "huggingface", chosen, length, vocab, settings), build


def open_model(path: str, tokenizer: str | None = None, context_length: int | None = None) -> tuple[ModelInfo, Build]:
    """All that can be known, and refused, of a checkpoint before its weights are read; and what reads them.

    :param tokenizer: a tokenizer file to use where the checkpoint's own cannot be reached; it must be the same tokenizer.
    :param context_length: use this instead of the length that the model was trained on.

    :raises UserError: for a folder that is no checkpoint of a known kind.
    """
    folder = choose_checkpoint(path)
    if kind_of(folder) in ("export", "huggingface"):
        info, build = _open_huggingface(folder, tokenizer, read_json(folder / "config.json", "checkpoint"))
    else:
        info, build = _open_trained(folder, tokenizer)
    info.context_length = context_length or info.context_length
    return info, build


def build_model(info: ModelInfo, build: Build, device: torch.device, dtype: str | None) -> ScoredModel:
    """Read the weights of what :func:`open_model` gave.

    :param dtype: a name in :data:`DTYPES`; bfloat16 on a GPU and float32 on a CPU if None.

    :raises UserError: for a damaged checkpoint.
    """
    log.info("%s: loading %s", info.label, info.path)
    module = build(device, DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")])
    head = module.get_output_embeddings() if info.kind == "huggingface" else module.lm_head
    return ScoredModel(**vars(info), module=module, head=head)


def load(
    path: str,
    *,
    device: torch.device | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    context_length: int | None = None,
) -> ScoredModel:
    """Load a checkpoint of this project, of OLMo-core, or a Hugging Face folder: :func:`open_model`, :func:`build_model`."""
    return build_model(*open_model(path, tokenizer, context_length), device or choose_device(None), dtype)
