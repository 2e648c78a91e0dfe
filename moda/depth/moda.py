"""Mixture-of-Depths Attention (MoDA, arXiv 2603.15619): attention to the K/V that earlier layers wrote for the same token.

For query head h of token t in layer l, with key/value head k = h // G, under one softmax:

    logits = [ q . K_seq[0..t] , q_depth . K_depth[t, slots of l] ] / sqrt(D)
    out    = softmax(logits) . [ V_seq[0..t] ; V_depth[t, slots of l] ]

Each layer may write two slots: its attention's K/V and a K/V pair projected from its FFN's input. With khat = k / rms(k) of the
raw projection, R the rotation at the token's position and g a k-norm's gain, slots are written once in their final form and
whatever a reader adds moves into its query (exact; a gain does not commute with a rotation):

    ================  =============  ===============  ============
    key_norm          rope           slot             q_depth
    ================  =============  ===============  ============
    writer            same_position  R(g_w khat)      R q
    writer            none           g_w khat         R q
    reader            same_position  R khat           R(g_r q)
    reader            none           khat             g_r (R q)
    none              either         as projected     R q
    ================  =============  ===============  ============
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from moda.errors import UserError
from moda_kernels.depth.layout import ATTENTION, FFN, DepthLayout

from .mechanism import (
    AttentionHost,
    Context,
    DepthLayer,
    DepthMechanism,
    DepthModel,
    DepthPass,
    Host,
    Received,
    SlotMemory,
    State,
    local,
    refused_but,
)
from .read import All, SlotPolicy

if TYPE_CHECKING:
    from moda.config.model import ModelConfig

__all__ = ["MoDA"]


class AttentionSlot(str, Enum):
    """What a layer's attention writes."""

    reuse = "reuse"
    """The layer's own K and V (paper, Table 3 row 3): no new parameters."""
    project = "project"
    """Separate K/V projections of the attention's input (Table 3 row 5)."""


class KeyNorm(str, Enum):
    """Which QK-norm a depth key goes through."""

    writer = "writer"
    """The writing layer's ``k_norm``, shared by all slots that the layer writes."""
    reader = "reader"
    """The reading layer's ``k_norm`` (the authors' language-model script)."""
    none = "none"
    """Projected keys raw, reused keys as the sequence has them."""


class DepthRoPE(str, Enum):
    """Whether a depth key is rotated."""

    same_position = "same_position"
    """At its own token's position, so that its position relative to the query is zero."""
    none = "none"
    """Left unrotated against a rotated query (the authors' language-model script)."""


class SlotDtype(str, Enum):
    """What slots are kept in."""

    fp8 = "fp8"
    """e4m3 with an fp32 scale per row of D numbers, quantised where written; gradients as of the model's dtype."""


class _Projection(nn.Module):
    """The linears of one K/V pair from a tensor of the block: two matrices ``d_model x (Hk * D)``."""

    def __init__(self, d_model: int, width: int, bias: bool) -> None:
        super().__init__()
        self.w_k = nn.Linear(d_model, width, bias=bias)
        self.w_v = nn.Linear(d_model, width, bias=bias)


class SlotsLayer(DepthLayer):
    """Reads slots in the attention; writes a slot after the attention and one before the FFN."""

    def __init__(self, mechanism: MoDA, model: ModelConfig, index: int) -> None:
        super().__init__()
        layout = mechanism.layout(model.n_layers)
        self.top = mechanism.read.kept
        n_scores = mechanism.scores(model.n_layers) if layout.reads[index] else 0
        self.scores = nn.Parameter(torch.zeros(n_scores)) if n_scores else None
        self.key_norm, self.rotated = mechanism.key_norm, mechanism.rope == DepthRoPE.same_position
        self.value_norm = model.norm_eps if mechanism.value_norm else None
        self.writes_attention = layout.written_slot(index, ATTENTION) is not None
        assert model.n_kv_heads is not None and model.head_dim is not None
        sizes = (model.d_model, model.n_kv_heads * model.head_dim, model.bias)
        projects = self.writes_attention and mechanism.attention == AttentionSlot.project
        self.attention_slot = _Projection(*sizes) if projects else None
        self.ffn_slot = _Projection(*sizes) if layout.written_slot(index, FFN) is not None else None

    def reset_parameters(self) -> None:
        if self.scores is not None:
            nn.init.zeros_(self.scores)

    def split_by_heads(self) -> list[nn.Module]:
        slots = [slot for slot in (self.attention_slot, self.ffn_slot) if slot is not None]
        return [linear for slot in slots for linear in (slot.w_k, slot.w_v)]

    def attend(
        self, attention: AttentionHost, x: Received, state: State, context: Context
    ) -> tuple[torch.Tensor, State]:
        assert isinstance(x, torch.Tensor)
        raw_q, raw_k, raw_v = attention.project(x)
        q, k = attention.normalise(raw_q, attention.q_norm), attention.normalise(raw_k, attention.k_norm)
        v = raw_v.unflatten(-1, (-1, attention.head_dim))
        q_depth: torch.Tensor | None = None
        reader = self.key_norm == KeyNorm.reader
        if reader and self.rotated:
            scaled = self._times_gain(attention, q)
            q_depth, _ = attention.rotate(scaled, scaled, context)
        q, k = attention.rotate(q, k, context)
        if reader and q_depth is None:
            q_depth = self._times_gain(attention, q)
        out, state = self._read(attention, q, k, v, q_depth, state, context)
        if self.writes_attention:
            if self.attention_slot is not None:
                k, v = self._project(attention, x, self.attention_slot, context)
            elif reader or not self.rotated:
                k, v = self._slot(attention, x, raw_k, raw_v, context, projected=False)
            else:
                v = self._value(x, v)
            state = attention.write_slot(k, v, ATTENTION, state, context)
        return attention.output(out), state

    def feed_forward(
        self,
        ffn: Callable[[torch.Tensor], torch.Tensor],
        attention: AttentionHost,
        x: torch.Tensor,
        state: State,
        context: Context,
    ) -> tuple[torch.Tensor, State]:
        if self.ffn_slot is not None:
            k, v = self._project(attention, x, self.ffn_slot, context)
            state = attention.write_slot(k, v, FFN, state, context)
        return ffn(x), state

    def _read(
        self,
        attention: AttentionHost,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_depth: torch.Tensor | None,
        state: State,
        context: Context,
    ) -> tuple[torch.Tensor, State]:
        """The attention ``[B, T, Hq, D]`` over the sequence and the slots, and the next state."""
        return attention.attend_with_slots(q, k, v, q_depth, state, context, self.top, self._bias(q))

    def _bias(self, q: torch.Tensor) -> torch.Tensor | None:
        """The scores of slots, which are added to their logits."""
        return None if self.scores is None else local(self.scores).to(torch.promote_types(q.dtype, torch.float32))

    def _project(
        self, attention: AttentionHost, x: torch.Tensor, projection: _Projection, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A slot from a tensor ``[B, T, d_model]`` of the block."""
        k, v = attention.linear(x, projection.w_k, projection.w_v)
        return self._slot(attention, x, k, v, context, projected=True)

    def _slot(
        self,
        attention: AttentionHost,
        x: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: Context,
        *,
        projected: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A slot ``[B, T, Hk, D]`` in its final form, of raw keys and values ``[B, T, Hk * D]`` of ``x``."""
        if self.key_norm == KeyNorm.reader:
            k = attention.normalise(k, _WithoutGain(attention.k_norm))
        else:
            k = attention.normalise(k, None if projected and self.key_norm == KeyNorm.none else attention.k_norm)
        if self.rotated:
            k, _ = attention.rotate(k, k, context)
        return k, self._value(x, v.unflatten(-1, (-1, attention.head_dim)))

    def _value(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Values ``[B, T, Hk, D]`` of ``x`` ``[B, T, d_model]`` as a slot has them."""
        if self.value_norm is None:
            return v
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1) + self.value_norm)
        return (v.to(wide.dtype) * scale[..., None, None]).to(v.dtype)

    @staticmethod
    def _times_gain(attention: AttentionHost, q: torch.Tensor) -> torch.Tensor:
        """``g_r q`` with this layer's k-norm gain, taken at kv head h // G for query head h; ``[B, T, Hq, D]``."""
        gain = attention.gain(attention.k_norm).view(-1, attention.head_dim)  # [Hk, D], or [1, D] for a per-head norm
        if gain.shape[0] > 1:
            gain = gain.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=0)
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q.to(wide) * gain.to(wide)).to(q.dtype)


class _WithoutGain:
    """khat = k / rms(k): a norm without its gain, in fp32 or above."""

    def __init__(self, norm: Any) -> None:
        self.eps = norm.eps

    def __call__(self, k: torch.Tensor) -> torch.Tensor:
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        return F.rms_norm(wide, k.shape[-1:], eps=self.eps).to(k.dtype)


class _Pass(DepthPass):
    def __init__(self, memory: SlotMemory) -> None:
        self.memory = memory

    def enter(self, layer: int, stream: Any) -> tuple[Any, State]:
        return stream, self.memory.enter(layer)

    def leave(self, layer: int, stream: Any, state: State) -> Any:
        self.memory.leave(layer, state)
        return stream


class SlotsModel(DepthModel):
    """Opens the memory of the slots for each pass."""

    def __init__(self, layout: DepthLayout) -> None:
        super().__init__()
        self.layout = layout

    def begin(self, h: torch.Tensor, host: Host) -> tuple[Any, DepthPass]:
        return h, _Pass(host.open_slots(self.layout, h.device))


@functools.lru_cache(256)  # every layer of a model asks for it
def layout_of(read: SlotPolicy, n_layers: int, kinds: int, quantised: bool = False) -> DepthLayout:
    """The layout of a policy, the same object for equal arguments."""
    return DepthLayout(read.reads(n_layers, kinds), kinds, quantised)


@dataclass(frozen=True)
class MoDA(DepthMechanism):
    """Attention over the sequence and over depth.

    :param attention: ``reuse`` the layer's own K/V as its slot, or ``project`` separate ones.
    :param ffn: whether each FFN's input is projected to one more slot (Table 3 row 4).
    :param key_norm: the norm that depth keys go through: the ``writer``'s, the ``reader``'s or ``none``.
    :param rope: depth keys rotated at the ``same_position`` as their token, or not (``none``).
    :param value_norm: divide a slot's values by the RMS of what they are projected from, which grows with depth where no norm
        precedes the sublayer, as in ``reordered`` (this project's; keys are normalised anyway).
    :param read: which slots a layer reads: a slot policy.
    :param slot_dtype: ``fp8`` for slots in e4m3 with an fp32 scale per token and head, which take about half the bytes (this
        project's); null for the model's dtype, which exported models have unless they are asked to round.
    """

    name = "moda"
    source = "arXiv 2603.15619"
    refused = refused_but("tensor_parallel", "context_parallel", "pipeline_parallel")
    no_weight_decay = ("*.depth.scores",)
    renamed: ClassVar[dict[str, str]] = {"slots": "read: {recent: N}"}

    attention: AttentionSlot = AttentionSlot.reuse
    ffn: bool = True
    key_norm: KeyNorm = KeyNorm.writer
    rope: DepthRoPE = DepthRoPE.same_position
    value_norm: bool = False
    read: SlotPolicy = All()
    slot_dtype: SlotDtype | None = None

    def layout(self, n_layers: int) -> DepthLayout:
        """Which slots the layers of a model write and read."""
        kinds = 2 if self.ffn else 1
        return layout_of(self.read, n_layers, kinds, self.slot_dtype == SlotDtype.fp8)

    def scores(self, n_layers: int) -> int:
        """Scores of each layer that reads slots, 0 unless the policy has some.

        As many as the layer that reads most has slots: layers with parameters of different shapes would share no compiled graph.
        """
        return max(map(len, self.layout(n_layers).reads)) if self.read.scored else 0

    def refuses(self, feature: str) -> str | None:
        if feature == "pipeline_parallel" and self.slot_dtype is not None:
            return f"each stage would round slots in {self.slot_dtype.value} again"
        return super().refuses(feature)

    def check(self, model: ModelConfig) -> None:
        if model.qk_norm.value == "none" and self.key_norm != KeyNorm.none:
            raise UserError("model.depth.key_norm", "none where model.qk_norm is none", self.key_norm.value)
        if model.n_layers > 1 and not self.layout(model.n_layers).n_slots:  # also refuses slots that cannot be
            hint = None if self.ffn else "there are no FFN slots: model.depth.ffn is false"
            raise UserError("model.depth.read", "a policy that reads some slot", self.read.to_plain(), hint)

        backend = model.attention_backend.value
        if self.read.kept is not None and backend not in ("auto", "reference"):
            expected = f"auto or reference with model.depth.read: {self.read.name}"
            raise UserError("model.attention_backend", expected, backend)
        if backend == "fused" and (self.read.scored or self.slot_dtype is not None):
            what = f"read: {self.read.name}" if self.slot_dtype is None else f"slot_dtype: {self.slot_dtype.value}"
            raise UserError("model.attention_backend", f"auto, split or reference with model.depth.{what}", backend)

    def build_layer(self, model: ModelConfig, index: int) -> DepthLayer:
        return SlotsLayer(self, model, index)

    def build_model(self, model: ModelConfig) -> DepthModel:
        return SlotsModel(self.layout(model.n_layers))

    def forward_flops_per_token(self, model: ModelConfig) -> int:
        assert model.head_dim is not None
        return 2 * model.n_heads * model.head_dim * sum(self._tensors_read(model))

    def _tensors_read(self, model: ModelConfig) -> tuple[int, int]:
        """Keys and values that a token reads in all layers."""
        read = [len(slots) for slots in self.layout(model.n_layers).reads]
        return sum(read), sum(n if self.read.kept is None else min(n, self.read.kept) for n in read)

    def block_memory(self, model: ModelConfig, tokens: float, element_size: int) -> float:
        """Projections of slots before their norm, their joint matrices, depth queries, and what is normalised in fp32."""
        layout, width = self.layout(model.n_layers), self._width(model)
        written = {
            kind: sum(layout.written_slot(layer, kind) is not None for layer in range(model.n_layers))
            for kind in (ATTENTION, FFN)
        }
        projected = written[FFN] + (written[ATTENTION] if self.attention == AttentionSlot.project else 0)
        assert model.head_dim is not None
        queries = model.n_layers * model.n_heads * model.head_dim if self.key_norm == KeyNorm.reader else 0
        total = element_size * (2 * width * projected * (tokens + model.d_model) + queries * tokens)
        if self.value_norm:  # of an attention slot the values, of an FFN slot the tensor that they are of
            total += 4 * tokens * (written[ATTENTION] * width + written[FFN] * model.d_model)
        return total

    @staticmethod
    def _width(model: ModelConfig) -> int:
        """Numbers of one token's keys (and of its values) in one slot."""
        assert model.n_kv_heads is not None and model.head_dim is not None
        return model.n_kv_heads * model.head_dim

    def describe(self, model: ModelConfig) -> list[tuple[str, str]]:
        layout, width = self.layout(model.n_layers), self._width(model)
        rows = f"{layout.training.total} with those of gradients"
        slot, kind = 2 * width, "bf16"
        if layout.quantised:
            assert model.n_kv_heads is not None
            rows = f"{layout.n_slots} in fp8, {layout.n_slots} of gradients"
            slot, kind = width + 4 * model.n_kv_heads, "fp8"
        n_scores = self.scores(model.n_layers) * sum(map(bool, layout.reads))
        scores = [("trained scores of slots", f"{n_scores:,}")] if n_scores else []
        return [
            ("depth slots", f"{layout.n_slots} ({layout.slots_read / model.n_layers:.1f} read per layer)"),
            ("a layer reads", self.read.describe()),
            ("rows of the depth buffers", f"{rows}; in evaluation {len(set(layout.rows))}"),
            (f"slot bytes read per token ({kind})", f"{slot * sum(self._tensors_read(model)):,}"),
            ("parameters of depth projections", f"{self.num_params(model) - n_scores:,}"),
            *scores,
        ]

    def draw(self, axes: Any, model: ModelConfig) -> None:
        self.read.draw(axes, model.n_layers, 2 if self.ffn else 1)
