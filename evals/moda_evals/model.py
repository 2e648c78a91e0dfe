"""Any model under one small interface: log-probabilities of chosen next tokens."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from moda.checkpoints import kind_of, load_model, open_checkpoint
from moda.config.schema import TokenizerSection
from moda.data import Tokenizer, load_tokenizer
from moda.errors import UserError

from .shared_prefix import Layout, shared_attention

__all__ = ["MAX_LOGITS", "ScoredModel", "TextTokenizer", "checkpoint_label", "load"]

log = logging.getLogger(__name__)

#: At most so many logits at once (2 GiB in fp32).
MAX_LOGITS = 1 << 29
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TextTokenizer:
    """Text to ids and back, with the ids that belong in front of every text.

    :param tokenizer: the tokenizer's description and file.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.description = tokenizer
        self._tokenizer = tokenizer.load()
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        dressed = self._tokenizer.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain), 0)
        #: Ids that the tokenizer puts before a text (a beginning-of-sequence token), usually none.
        self.prefix: tuple[int, ...] = tuple(dressed[:start])

    @property
    def eos_token_id(self) -> int:
        return self.description.config.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, nothing added."""
        return [e.ids for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for what it is still doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass
class ScoredModel:
    """A model that can be asked for log-probabilities.

    :param label: short name for tables.
    :param path: the checkpoint's folder.
    :param kind: ``moda``, ``olmo-core`` or ``huggingface``.
    :param module: the network; called with ids ``[B, T]`` it gives logits, or an output that has them.
    :param head: the submodule that turns hidden states ``[B, T, d_model]`` into logits, or None if it is not known.
    :param tokenizer_info: the tokenizer's description (its file is read when text must be encoded), or None.
    :param context_length: tokens that the model was made for.
    :param settings: the configuration that came with the checkpoint.
    """

    label: str
    path: str
    kind: str
    module: nn.Module
    head: nn.Module | None
    tokenizer_info: Tokenizer | None
    context_length: int
    vocab_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    _tokenizer: TextTokenizer | None = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer itself.

        :raises UserError: where it is not at hand, or has more tokens than the model.
        """
        if self._tokenizer is None:
            if self.tokenizer_info is None:
                raise UserError(
                    "checkpoint", "a checkpoint that names its tokenizer", self.path, "give one with --tokenizer"
                )
            self._tokenizer = TextTokenizer(self.tokenizer_info)
        return self._tokenizer

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

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def describe(self) -> dict[str, Any]:
        """What a result says about the model it belongs to."""
        return {
            "label": self.label,
            "path": self.path,
            "kind": self.kind,
            "parameters": self.n_params,
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

        The head runs on the N asked positions only, where it is known, and on no more at once than give 2 GiB of logits where
        it is the model's last step (:attr:`ends_with_head`).

        :param layout: sequences, or trees of them, padded on the right: attention is causal.
        """
        device = self.device
        plain = layout.is_plain
        ids, rows, columns, targets = (_send(t, device) for t in (layout.ids, rows, columns, targets))
        hook, asked = None, []
        if self.head is not None:

            def pick(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[0]
                if hidden.shape[:2] != ids.shape:
                    return None
                asked.append(hidden[rows, columns][None])
                return (hidden[:1, :1] if self.ends_with_head else asked[0], *args[1:]), kwargs

            hook = self.head.register_forward_pre_hook(pick, with_kwargs=True)
        try:
            with contextlib.ExitStack() as stack:
                shared = {} if plain else stack.enter_context(shared_attention(self.module, layout, device))
                logits = self.logits(ids, **shared)
        finally:
            if hook is not None:
                hook.remove()
        if not asked or self.head is None:
            return -F.cross_entropy(logits[rows, columns].float(), targets, reduction="none")
        if not self.ends_with_head:
            return -F.cross_entropy(logits[0].float(), targets, reduction="none")
        at_once = max(1, MAX_LOGITS // self.vocab_size)
        found = []
        with torch.no_grad():
            for hidden, wanted in zip(asked[0].split(at_once, 1), targets.split(at_once)):
                found.append(-F.cross_entropy(self.head(hidden)[0].float(), wanted, reduction="none"))
        return torch.cat(found)


def checkpoint_label(path: Path) -> str:
    """``<run>-<stepN>`` for a training checkpoint, the folder's name otherwise."""
    path = path.resolve()
    return f"{path.parent.name}-{path.name}" if path.name.startswith("step") else path.name


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _tokenizer(given: str | None, found: TokenizerSection | None, vocab_size: int) -> Tokenizer | None:
    """The checkpoint's tokenizer, or the one given instead of it; it must be able to be the model's."""
    theirs = None if found is None else load_tokenizer(found)
    if given is None:
        ours = theirs
    else:
        hub = theirs.hub if theirs is not None else None
        ours = load_tokenizer(TokenizerSection(given, hub=hub))
    if ours is None:
        return None
    if ours.config.vocab_size > vocab_size:
        raise UserError(
            "--tokenizer" if given else "checkpoint",
            f"a tokenizer of at most the {vocab_size:,} tokens that the model knows",
            f"{ours.name} with {ours.config.vocab_size:,}",
        )
    if given is not None and theirs is not None:
        mine, other = ours.config, theirs.config
        same_file = ours.fingerprint == theirs.fingerprint
        if theirs.path is not None and not same_file:
            raise UserError(
                "--tokenizer", f"the tokenizer that the model was trained with: {theirs.name} ({theirs.fingerprint[:20]})",
                f"{ours.name} ({ours.fingerprint[:20]})",
            )  # fmt: skip
        if (mine.vocab_size, mine.eos_token_id) != (other.vocab_size, other.eos_token_id) and not same_file:
            raise UserError(
                "--tokenizer",
                f"a tokenizer like {theirs.name}: {other.vocab_size:,} tokens, document end {other.eos_token_id}",
                f"{mine.vocab_size:,} tokens, document end {mine.eos_token_id} ({ours.name})",
            )
    return ours


def _load_trained(path: Path, device: torch.device, dtype: torch.dtype, tokenizer: str | None) -> ScoredModel:
    checkpoint = open_checkpoint(path)
    module = load_model(checkpoint, device, dtype)
    padding = getattr(checkpoint.model.lm_head, "padding", 0)
    vocab = checkpoint.model.vocab_size - padding
    return ScoredModel(
        label=checkpoint_label(path),
        path=str(path),
        kind=checkpoint.kind,
        module=module,
        head=module.lm_head,
        tokenizer_info=_tokenizer(tokenizer, checkpoint.tokenizer, vocab),
        context_length=checkpoint.sequence_length or 2048,
        vocab_size=vocab,
        settings=checkpoint.settings,
    )


def _load_huggingface(path: Path, device: torch.device, dtype: torch.dtype, tokenizer: str | None) -> ScoredModel:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "checkpoint", "transformers, to load a Hugging Face folder", hint="pip install -e '.[hf]'"
        ) from None
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not list(path.glob("*.safetensors")):
        raise UserError("checkpoint", "weights in safetensors (pickles are not read)", str(path))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from moda.hf import register

    register()  # a folder exported by this project is read by this project's classes, never by the code in the folder
    try:
        module: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # transformers raises many kinds
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            "checkpoint", f"a causal language model that transformers loads from {path}", hint=reason
        ) from None
    module = module.to(device).eval()
    module.config.use_cache = False
    head = module.get_output_embeddings()
    section = TokenizerSection(str(path)) if (path / "tokenizer.json").is_file() else None
    vocab = int(module.config.vocab_size)
    return ScoredModel(
        label=checkpoint_label(path),
        path=str(path),
        kind="huggingface",
        module=module,
        head=head,
        tokenizer_info=_tokenizer(tokenizer, section, vocab),
        context_length=int(getattr(module.config, "max_position_embeddings", None) or 2048),
        vocab_size=vocab,
        settings=settings,
    )


def load(
    path: str,
    *,
    device: torch.device | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    context_length: int | None = None,
) -> ScoredModel:
    """Load a checkpoint of this project, of OLMo-core, or a Hugging Face folder.

    :param dtype: ``float32``, ``bfloat16`` or ``float16``; bfloat16 on a GPU and float32 on a CPU if None.
    :param tokenizer: a tokenizer file to use where the checkpoint's own cannot be reached; it must be the same tokenizer.
    :param context_length: use this instead of the length that the model was trained on.

    :raises UserError: for a folder that is none of these, or a damaged one.
    """
    folder = Path(path).expanduser()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = _default_dtype(device) if dtype is None else DTYPES[dtype]
    if kind_of(folder) in ("export", "huggingface"):
        model = _load_huggingface(folder, device, kind, tokenizer)
    else:
        model = _load_trained(folder, device, kind, tokenizer)
    if context_length is not None:
        model.context_length = context_length
    return model
