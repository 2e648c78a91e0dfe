"""Attention over a layer's sequence K/V and the depth stream.

With khat = k / rms(k) of the raw projection, R the rotation at the token's position and g a k-norm's gain, slots are written
once in their final form and whatever a reader adds moves into its query (exact; a gain does not commute with a rotation):

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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from olmo_core.nn.attention import Attention, AttentionConfig
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope import RotaryEmbedding
from olmo_core.nn.transformer.init import InitMethod, init_linear

from moda_kernels.depth_stream import ATTENTION, FFN, depth_attention, depth_write

from .depth_kv import DepthAttention, DepthKeyNorm, DepthKVConfig, DepthProjection, DepthRoPE, joint_linear

__all__ = ["MoDAAttention", "MoDAAttentionConfig"]

_UNSUPPORTED = (
    "gate", "clip_qkv", "sliding_window", "scalable_softmax", "attention_sinks", "use_flash", "backend", "dropout",
    "qk_norm_per_head_gains", "use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward",
)  # fmt: skip


def _one_row(x: torch.Tensor, packed: bool) -> torch.Tensor:
    """``[B, T, H, D]``, as one row ``[1, B * T, H, D]`` of packed documents if asked."""
    return x.reshape(1, -1, *x.shape[2:]) if packed else x


@SequenceMixerConfig.register("moda_attention")
@dataclass
class MoDAAttentionConfig(AttentionConfig):
    """OLMo-core's attention config with a depth stream; :meth:`num_params` leaves out what depends on the layer."""

    depth_kv: DepthKVConfig | None = None

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> MoDAAttention:
        """Build the attention of one layer.

        :raises ValueError: for options of OLMo-core's attention that the depth stream does not have.
        """
        depth_kv = self.depth_kv
        if depth_kv is None:
            raise ValueError("moda_attention needs depth_kv; without it use OLMo-core's own attention")
        asked = [name for name in _UNSUPPORTED if getattr(self, name)]
        if asked:
            raise ValueError(f"depth_kv does not work together with attention option {', '.join(asked)}")
        return MoDAAttention(
            d_model=d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            bias=True if self.bias is None else self.bias,
            rope=self.rope,
            qk_norm=self.qk_norm,
            use_head_qk_norm=bool(self.use_head_qk_norm),
            dtype=self.dtype.as_pt(),
            init_device=init_device,
            cache=cache,
            depth_kv=depth_kv,
            layer_idx=layer_idx,
            n_layers=n_layers,
        )


class MoDAAttention(Attention):
    """Multi-head attention (GQA) whose softmax also covers the depth slots of the same token.

    :param depth_kv: form of the depth stream.
    :param layer_idx: index of the layer, from 0.
    :param n_layers: layers of the model.
    :param kwargs: those of OLMo-core's ``Attention``.
    """

    def __init__(self, *, depth_kv: DepthKVConfig, layer_idx: int, n_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth_kv = depth_kv
        layout = depth_kv.layout(n_layers)
        first, end = layout.read_range(layer_idx)
        self.n_slots_read = end - first
        self.writes_attention = layout.written_slot(layer_idx, ATTENTION) is not None
        self.writes_ffn = layout.written_slot(layer_idx, FFN) is not None
        self.depth_projection: DepthProjection | None = None
        if depth_kv.attention == DepthAttention.project and self.writes_attention:
            self.depth_projection = DepthProjection(
                self.d_model,
                self.n_kv_heads * self.head_dim,
                bias=kwargs["bias"],
                dtype=kwargs["dtype"],
                init_device=kwargs["init_device"],
            )

    def _normalise(self, x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
        """Apply a QK-norm to ``[B, T, H * D]``, full-width or per head, and return ``[B, T, H, D]``."""
        if self.use_head_qk_norm:
            x = x.unflatten(-1, (-1, self.head_dim))
            return x if norm is None else norm(x)
        return (x if norm is None else norm(x)).unflatten(-1, (-1, self.head_dim))

    def _without_gain(self, k: torch.Tensor) -> torch.Tensor:
        """khat = k / rms(k), over the width that this layer's k-norm uses; ``[B, T, Hk, D]``."""
        assert self.k_norm is not None
        if self.use_head_qk_norm:
            k = k.unflatten(-1, (-1, self.head_dim))
        khat = F.rms_norm(k.float() if k.dtype != torch.float64 else k, k.shape[-1:], eps=self.k_norm.eps).to(k.dtype)
        return khat if self.use_head_qk_norm else khat.unflatten(-1, (-1, self.head_dim))

    def _times_reader_gain(self, q: torch.Tensor) -> torch.Tensor:
        """``g_r q`` with this layer's k-norm gain, taken at kv head h // G for query head h; ``[B, T, Hq, D]``."""
        assert self.k_norm is not None and self.k_norm.weight is not None
        gain = self.k_norm.weight.view(-1, self.head_dim)  # [Hk, D], or [1, D] for a per-head norm
        group = self.n_heads // self.n_kv_heads
        if gain.shape[0] > 1:
            gain = gain.repeat_interleave(group, dim=0)
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        return (q.to(wide) * gain.to(wide)).to(q.dtype)

    def _rotate(self, q: torch.Tensor, k: torch.Tensor, rope: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rope is None:
            return q, k
        assert isinstance(self.rope, RotaryEmbedding)
        return self.rope(q, k, head_first=False, **rope)

    def depth_slot(
        self, k: torch.Tensor, v: torch.Tensor, rope: dict[str, Any], *, projected: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Depth keys and values in the form in which they are written.

        :param k: ``[B, T, Hk * D]`` raw keys of this layer.
        :param v: ``[B, T, Hk * D]`` values.
        :param rope: what the rotation needs (``cu_doc_lens``).
        :param projected: whether ``k`` comes from a depth projection (so that key norm ``none`` leaves it raw).

        :returns: two tensors ``[B, T, Hk, D]``.
        """
        key_norm = self.depth_kv.key_norm
        if key_norm == DepthKeyNorm.reader:
            k = self._without_gain(k)
        else:
            raw = key_norm == DepthKeyNorm.none and projected
            k = self._normalise(k, None if raw else self.k_norm)
        if self.depth_kv.rope == DepthRoPE.same_position:
            k, _ = self._rotate(k, k, rope)
        return k, v.unflatten(-1, (-1, self.head_dim))

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        *,
        token: torch.Tensor,
        control: torch.Tensor,
        cu_doc_lens: torch.Tensor | None = None,
        max_doc_len: int | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over the sequence and the depth stream, then write this layer's own slot.

        :param x: ``[B, T, d_model]``.
        :param token: the depth stream's last token.
        :param control: ``stream.control[layer_idx]``.
        :param cu_doc_lens: int32 ``[N + 1]`` boundaries of the documents in the flattened batch (intra-document masking).
        :param max_doc_len: accepted for OLMo-core's calling convention; the boundaries say all that is needed.
        :param mask: bool ``[B, T, T]``, which sequence keys each query sees, in place of the causal mask; for inference only.

        :returns: ``[B, T, d_model]`` and the next token.
        """
        del max_doc_len
        B, T, _ = x.shape
        rope: dict[str, Any] = {} if cu_doc_lens is None else {"cu_doc_lens": cu_doc_lens}
        raw_q, raw_k, raw_v = joint_linear(x, self.w_q, self.w_k, self.w_v)
        q = self._normalise(raw_q, self.q_norm)
        k = self._normalise(raw_k, self.k_norm)
        v = raw_v.unflatten(-1, (-1, self.head_dim))
        q_depth: torch.Tensor | None = None
        reader = self.depth_kv.key_norm == DepthKeyNorm.reader
        if reader and self.depth_kv.rope == DepthRoPE.same_position:
            scaled = self._times_reader_gain(q)
            q_depth, _ = self._rotate(scaled, scaled, rope)
        q, k = self._rotate(q, k, rope)
        if reader and q_depth is None:
            q_depth = self._times_reader_gain(q)

        packed = cu_doc_lens is not None
        out, token = depth_attention(
            _one_row(q, packed),
            _one_row(k, packed),
            _one_row(v, packed),
            token,
            control,
            q_depth=None if q_depth is None else _one_row(q_depth, packed),
            cu_seqlens=cu_doc_lens,
            mask=mask,
        )

        if self.writes_attention:
            if self.depth_projection is not None:
                raw_k, raw_v = self.depth_projection(x)
                k, v = self.depth_slot(raw_k, raw_v, rope, projected=True)
            elif reader or self.depth_kv.rope == DepthRoPE.none:
                k, v = self.depth_slot(raw_k, raw_v, rope, projected=False)
            token = self.write_slot(token, k, v, control, ATTENTION, packed=packed)
        return self.w_out(out.reshape(B, T, -1)), token

    def write_slot(
        self, token: torch.Tensor, k: torch.Tensor, v: torch.Tensor, control: torch.Tensor, kind: int, *, packed: bool
    ) -> torch.Tensor:
        """Write ``[B, T, Hk, D]`` keys and values, as one packed row ``[1, B * T, Hk, D]`` under intra-document masking."""
        return depth_write(token, _one_row(k, packed), _one_row(v, packed), control, kind)

    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().init_weights(
            init_method=init_method,
            d_model=d_model,
            block_idx=block_idx,
            num_blocks=num_blocks,
            std=std,
            generator=generator,
        )
        if self.depth_projection is not None:
            for linear in (self.depth_projection.w_k, self.depth_projection.w_v):
                init_linear(linear, std=std, generator=generator)

    def num_flops_per_token(self, seq_len: int) -> int:
        """OLMo-core's count (causal attention halved, backward = twice the forward) plus the depth slots read."""
        return super().num_flops_per_token(seq_len) + 12 * self.n_heads * self.head_dim * self.n_slots_read
