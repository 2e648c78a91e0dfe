"""Attention over the sequence and over depth, and the residual stream by layer, from one forward pass over a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moda.errors import UserError


@dataclass(frozen=True)
class Look:
    """What was measured of one model on T tokens. Tensors are fp32 or above, on the CPU.

    :param tokens: the text of each token.
    :param weights: for each layer the attention weights ``[Hq, T, T + S]``: the sequence, then the slots that the layer reads.
    :param sources: for each layer the names of these slots, ``layer 3 FFN``.
    :param streams: the residual stream before each block and the final norm's output, ``[L + 1, T, d_model]``; None for a
        mechanism whose stream is no single tensor.
    :param lens: for each of them the mean loss of the next token in nats, and how often its likeliest token is the model's.
    """

    name: str
    tokens: list[str]
    weights: list[torch.Tensor]
    sources: list[list[str]]
    streams: torch.Tensor | None
    lens: list[tuple[float, float]]

    @property
    def length(self) -> int:
        return len(self.tokens)

    def depth_mass(self) -> torch.Tensor:
        """The share of each head's attention that depth gets, a mean over tokens, ``[L, Hq]``."""
        return torch.stack([w[..., self.length :].sum(-1).mean(-1) for w in self.weights])

    def slot_mass(self) -> list[dict[str, float]]:
        """For each layer the share that each slot gets, a mean over heads and tokens."""
        means = (w[..., self.length :].mean((0, 1)).tolist() for w in self.weights)
        return [dict(zip(names, mass)) for names, mass in zip(self.sources, means)]

    def sink_mass(self) -> torch.Tensor:
        """The share that the first token gets from those after it, ``[L, Hq]``: attention sinks."""
        return torch.stack([w[:, 1:, 0].mean(-1) for w in self.weights])

    def cosine(self) -> torch.Tensor | None:
        """Cosine between the streams at two depths, a mean over tokens, ``[L + 1, L + 1]``."""
        if self.streams is None:
            return None
        unit = F.normalize(self.streams, dim=-1)
        return torch.einsum("atd,btd->ab", unit, unit) / self.length


def _sources(decoder: Any) -> list[list[str]]:
    section = decoder.config.section()
    layout = None if section.depth is None else section.depth.layout(section.n_layers)
    if layout is None:
        return [[] for _ in range(section.n_layers)]
    kinds = ("attention", "FFN")
    return [[f"layer {s // layout.kinds} {kinds[s % layout.kinds]}" for s in slots] for slots in layout.reads]


@torch.no_grad()
def look(decoder: Any, ids: Sequence[int], tokens: Sequence[str], name: str) -> Look:
    """Run a text through a model and keep what it attends to.

    :param decoder: the exported form of a model (:func:`moda.generate.load_decoder`).
    :param ids: T token ids, at least 2.
    :param tokens: their text.

    :raises UserError: for a text of fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError("--text", "at least two tokens", len(ids))
    batch = torch.tensor([list(ids)], device=decoder.device)
    weights: list[torch.Tensor] = []
    streams: list[Any] = []
    hidden = decoder.model.run(decoder.model.embed_tokens(batch), streams=streams, attentions=weights)
    logits = decoder.lm_head(hidden)[0].float()
    plain = all(isinstance(x, torch.Tensor) and x.shape == hidden.shape for x in streams)
    lens = []
    for i, x in enumerate([*streams, hidden] if plain else []):
        seen = logits if i == len(streams) else decoder.lm_head(decoder.model.norm(x))[0].float()
        loss = F.cross_entropy(seen[:-1], batch[0, 1:]).item()
        lens.append((loss, (seen.argmax(-1) == logits.argmax(-1)).float().mean().item()))
    stacked = torch.cat([*streams, hidden]).float().cpu() if plain else None
    return Look(name, list(tokens), [w[0].float().cpu() for w in weights], _sources(decoder), stacked, lens)
