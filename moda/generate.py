"""Text from a checkpoint, token by token, with a key/value cache.

The cache holds the sequence's keys and values. Depth slots are not cached: a token's slots are read by later layers of the same
token only, so they are thrown away when the token is done (see ``hf/decoder_moda.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from moda.checkpoints import kind_of, open_checkpoint, read_weights
from moda.config.schema import TokenizerSection
from moda.data import Tokenizer, load_tokenizer
from moda.errors import UserError
from moda.hf import fields_of, read_export, to_hf
from moda.hf.decoder_moda import KVCache, MoDADecoder

__all__ = ["Sampling", "generate", "load_decoder", "stream_text"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    :param temperature: 0 takes the likeliest.
    :param top_k: only among the k likeliest; None for all.
    :param top_p: only among the likeliest that together have this probability.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError("--temperature", "a number >= 0", self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise UserError("--top-k", "a number >= 1", self.top_k)
        if not 0 < self.top_p <= 1:
            raise UserError("--top-p", "a number above 0, at most 1", self.top_p)

    def choose(self, logits: torch.Tensor, generator: torch.Generator | None) -> int:
        """A token for logits ``[V]``."""
        if self.temperature == 0:
            return int(logits.argmax())
        p = (logits.float() / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < len(p):
            p = p.masked_fill(p < p.topk(self.top_k).values[-1], 0.0)
        if self.top_p < 1:
            ordered, order = p.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p * ordered.sum()
            p = p.index_fill(0, order[beyond], 0.0)
        return int(torch.multinomial(p, 1, generator=generator))


def load_decoder(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, tokenizer: str | None = None
) -> tuple[MoDADecoder, Tokenizer | None, int]:
    """A checkpoint of this project or of OLMo-core, or an export, as a decoder with a cache.

    :returns: the decoder, its tokenizer, and the context length.

    :raises UserError: for a folder that is none of these.
    """
    section: TokenizerSection | None
    if kind_of(folder) in ("export", "huggingface"):
        fields, named, _ = read_export(folder)
        section = TokenizerSection(str(folder)) if (folder / "tokenizer.json").is_file() else None
    else:
        checkpoint = open_checkpoint(folder)
        fields = fields_of(checkpoint.model, checkpoint.sequence_length or 2048)
        named, section = to_hf(read_weights(folder), fields.vocab_size), checkpoint.tokenizer
    decoder = MoDADecoder(SimpleNamespace(**vars(fields)))
    if fields.tie_word_embeddings:
        named["lm_head.weight"] = named["model.embed_tokens.weight"]
    try:
        decoder.load_state_dict({name.removeprefix("model."): w for name, w in named.items()})
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            "checkpoint", f"the weights of the model that its config describes in {folder}", hint=reason
        ) from None
    section = section if tokenizer is None else TokenizerSection(tokenizer)
    found = None if section is None else load_tokenizer(section)
    return decoder.to(device=device, dtype=dtype).eval(), found, fields.max_position_embeddings


@torch.no_grad()
def generate(
    decoder: MoDADecoder,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
    context_length: int | None = None,
) -> Iterator[int]:
    """New tokens after ``ids``, one at a time, until one of ``stop`` (which is not given) or the context is full.

    :raises UserError: for an empty prompt or one that leaves no room in the context.
    """
    if not ids:
        raise UserError("prompt", "at least one token", "none")
    if context_length is not None and len(ids) >= context_length:
        raise UserError(
            "prompt",
            f"fewer tokens than the model's context of {context_length}",
            len(ids),
            "--context-length N allows more",
        )
    device = decoder.norm.weight.device
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KVCache()
    new = torch.tensor([list(ids)], device=device)
    room = max_new_tokens if context_length is None else min(max_new_tokens, context_length - len(ids))
    for _ in range(room):
        hidden = decoder.run(decoder.embed_tokens(new), cache=cache)
        token = sampling.choose(decoder.lm_head(hidden[0, -1]), generator)
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]], device=device)


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text as soon as they are whole: a character whose bytes are spread over tokens waits for its last one."""
    decoder = tokenizer.load()
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decoder.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = decoder.decode(ids, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]
