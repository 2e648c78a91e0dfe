"""The ``model`` section: the one description of a model, in YAML, in checkpoints and in exported folders.

Exported folders carry a copy of this file: it imports neither torch nor OLMo-core. :mod:`moda.model` builds what it describes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from moda.depth import DepthMechanism
from moda.errors import UserError
from moda.placements import NormPlacement
from moda.ranges import Count, Positive, Range
from moda.typed import Section

from .choices import Backend, QKNorm

__all__ = ["ModelConfig"]

Width = Annotated[int, Range(1, 2**20)]
Heads = Annotated[int, Range(1, 2**16, unit="heads")]


def _reordered() -> NormPlacement:
    return NormPlacement.from_plain("reordered", "model.norm_placement")


@dataclass
class ModelConfig(Section):
    """``model``: the decoder.

    :param d_model: width of the residual stream.
    :param n_layers: blocks, each with attention and FFN.
    :param n_heads: query heads.
    :param ffn_hidden_size: width of the SwiGLU FFN.
    :param n_kv_heads: key/value heads; ``n_heads`` if null.
    :param head_dim: ``d_model / n_heads`` if null.
    :param vocab_size: tokens the model can predict; the tokenizer's if null.
    :param pad_vocab_to: embedding and head get a multiple of this many rows; padding stays out of the softmax.
    :param tie_embeddings: whether head and embedding share their matrix.
    :param norm_placement: ``pre``, ``post``, ``reordered`` (OLMo2's) or ``peri``.
    :param qk_norm: RMSNorm on queries and keys over all heads (``full``), per ``head``, or ``none``.
    :param bias: whether the linears of the blocks have biases.
    :param norm_eps: epsilon of every RMSNorm.
    :param rope_theta: base of the rotary embedding.
    :param init_std: standard deviation of the initial weights, a normal truncated at three of them.
    :param depth: how layers read what earlier layers left: ``{mechanism: NAME, ...its options}``; null is the plain residual
        stream.
    :param attention_backend: backend of the MoDA operator. Without ``depth``, ``auto`` is FlashAttention 4 through the operator
        where that is installed, and OLMo-core's own attention elsewhere.
    """

    renamed: ClassVar[dict[str, str]] = {"depth_kv": "model.depth: {mechanism: moda, ...}"}

    key: ClassVar[str] = "model"

    d_model: Width
    n_layers: Annotated[int, Range(1, 1000, unit="layers")]
    n_heads: Heads
    ffn_hidden_size: Width
    n_kv_heads: Heads | None = None
    head_dim: Width | None = None
    vocab_size: Annotated[int, Range(2, 2**31, unit="tokens")] | None = None
    pad_vocab_to: Annotated[int, Range(1, 2**20, unit="rows")] = 1
    tie_embeddings: bool = True
    norm_placement: NormPlacement = field(default_factory=_reordered)
    qk_norm: QKNorm = QKNorm.full
    bias: bool = False
    norm_eps: Positive = 1e-6
    rope_theta: Count = 500_000
    init_std: Positive = 0.02
    depth: DepthMechanism | None = None
    attention_backend: Backend = Backend.auto

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                expected = f"a divisor of model.d_model ({self.d_model})"
                raise UserError("model.n_heads", expected, self.n_heads, "or set model.head_dim")
            self.head_dim = self.d_model // self.n_heads
        if self.head_dim % 2:
            raise UserError("model.head_dim", "an even number (rotary embedding)", self.head_dim)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise UserError("model.n_kv_heads", f"a divisor of model.n_heads ({self.n_heads})", self.n_kv_heads)
        if self.depth is not None:
            self.depth.check(self)

    def refuses(self, feature: str) -> str | None:
        """Why the model does not work with a feature, or None: see :meth:`moda.depth.DepthMechanism.refuses`."""
        return None if self.depth is None else self.depth.refuses(feature)

    def rows(self, vocab_size: int | None = None) -> int:
        """Rows of the embedding, padding included.

        :param vocab_size: the tokenizer's, used where :attr:`vocab_size` is null.

        :raises UserError: where neither is known.
        """
        vocab = self.vocab_size or vocab_size
        if vocab is None:
            raise UserError("model.vocab_size", "a number of tokens, where no tokenizer gives one")
        return -(-vocab // self.pad_vocab_to) * self.pad_vocab_to
