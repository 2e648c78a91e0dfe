"""Text from a checkpoint, by transformers' ``generate`` on the model as it is exported."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moda.checkpoints import choose_checkpoint, kind_of, open_checkpoint, read_weights
from moda.config.schema import ModelConfig, TokenizerSection
from moda.data import Tokenizer, load_tokenizer
from moda.errors import UserError
from moda.hf import read_export, section_of, to_hf
from moda.typed import to_dict

log = logging.getLogger(__name__)

__all__ = ["Sampling", "generate", "load_decoder", "stream_text"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    :param temperature: 0 takes the likeliest.
    :param top_k: only among the k likeliest; None for all.
    :param top_p: only among the likeliest that together have this probability.
    :param seed: the same seed gives the same tokens.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):  # below, logits overflow
            raise UserError("--temperature", "0, or a number >= 1e-06", self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise UserError("--top-k", "a number >= 1", self.top_k)
        if not 0 < self.top_p <= 1:
            raise UserError("--top-p", "a number above 0, at most 1", self.top_p)

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p}


def build_decoder(model: ModelConfig, weights: dict[str, torch.Tensor], length: int = 2048) -> Any:
    """The exported form of a model, on the CPU.

    :param model: its section, with the vocabulary.
    :param weights: its weights under their exported names (:func:`moda.hf.to_hf`).
    :param length: its context length.

    :raises UserError: without transformers.
    :raises RuntimeError: for weights that are not those of the model.
    """
    try:
        from moda.hf.configuration_moda import MoDAConfig
        from moda.hf.modeling_moda import MoDAForCausalLM
    except ImportError:
        raise UserError("model", "transformers to be installed", hint="pip install -e '.[hf]'") from None
    if model.tie_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    decoder = MoDAForCausalLM(MoDAConfig(model=to_dict(model), max_position_embeddings=length))
    decoder.load_state_dict(weights)
    return decoder.eval()


def load_decoder(
    path: str | Path, device: torch.device, dtype: torch.dtype = torch.float32, tokenizer: str | None = None
) -> tuple[Any, Tokenizer | None, int]:
    """A checkpoint of this project or of OLMo-core, or an export, as the exported model.

    :param path: its folder, or that of a run, whose newest whole checkpoint is taken.

    :returns: the model (``MoDAForCausalLM``), its tokenizer, and the context length.

    :raises UserError: for a folder that is none of these.
    """
    folder = choose_checkpoint(path)
    log.info("loading %s", folder)
    section: TokenizerSection | None
    if kind_of(folder) in ("export", "huggingface"):
        export = read_export(folder)
        described, weights, length = export.model, export.weights, export.sequence_length
        section = TokenizerSection(str(folder)) if (folder / "tokenizer.json").is_file() else None
    else:
        checkpoint = open_checkpoint(folder)
        described, length, section = (
            section_of(checkpoint.model),
            checkpoint.sequence_length or 2048,
            checkpoint.tokenizer,
        )
        assert described.vocab_size is not None
        weights = to_hf(read_weights(folder), described.vocab_size)
    try:
        model = build_decoder(described, weights, length)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            "checkpoint", f"the weights of the model that its config describes in {folder}", hint=reason
        ) from None
    section = section if tokenizer is None else TokenizerSection(tokenizer)
    model = model.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg]
    return model, None if section is None else load_tokenizer(section), length


class _Stream:
    """A streamer of transformers' ``generate`` that hands tokens to another thread; None ends them."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[int | None] = queue.Queue()
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.tokens.put(int(value))
        self._prompt = False

    def end(self) -> None:
        self.tokens.put(None)


def generate(
    model: Any,
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
        expected = f"fewer tokens than the model's context of {context_length}"
        raise UserError("prompt", expected, len(ids), "--context-length N allows more")
    room = max_new_tokens if context_length is None else min(max_new_tokens, context_length - len(ids))
    return _generate(model, ids, room, sampling, stop)


def _generate(model: Any, ids: Sequence[int], room: int, sampling: Sampling, stop: Sequence[int]) -> Iterator[int]:
    stream, failure = _Stream(), []

    def run() -> None:
        prompt = torch.tensor([list(ids)], device=model.device)
        try:
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                if sampling.seed is None:
                    torch.seed()  # else every text would begin at the state that the fork brings back
                else:
                    torch.manual_seed(sampling.seed)
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=room,
                    eos_token_id=list(stop) or None,
                    pad_token_id=0,
                    streamer=stream,
                    **sampling.arguments(),
                )
        except BaseException as e:
            failure.append(e)
            stream.end()

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    while (token := stream.tokens.get()) is not None:
        if token in stop:
            break
        yield token
    worker.join()
    if failure:
        raise failure[0]


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text as soon as they are whole: a character whose bytes are spread over tokens waits for its last one.

    transformers' streamers hold text back until the next space.
    """
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
