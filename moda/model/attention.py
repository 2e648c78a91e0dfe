"""OLMo-core's attention, taken apart into the steps that a depth mechanism calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from olmo_core.nn.attention import Attention, AttentionConfig
from olmo_core.nn.attention.backend import TorchAttentionBackend
from olmo_core.nn.attention.base import SequenceMixerConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.rope import RotaryEmbedding
from torch.distributed import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from moda.depth.mechanism import Context, DepthLayer, Received, State, local
from moda_kernels import depth_attention, depth_write, moda_attention, sequence_kernel, slot_attention
from moda_kernels.depth.masked import masked_attention
from moda_kernels.depth.past import past_attention

from .chunks import past_chunks
from .linear import joint_linear
from .split import distribute, rms_norm

__all__ = ["DepthAttention", "DepthAttentionConfig", "OperatorBackend", "use_operator"]

#: Options of OLMo-core's attention that the steps below leave out.
_UNSUPPORTED = (
    "gate", "clip_qkv", "sliding_window", "scalable_softmax", "attention_sinks", "use_flash", "backend", "dropout",
    "qk_norm_per_head_gains", "use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward",
)  # fmt: skip


class OperatorBackend(TorchAttentionBackend):
    """The operator without slots, called by OLMo-core's own attention.

    :param kernel: backend of the operator. ``auto`` leaves what FlashAttention 4 does not take to OLMo-core.
    :param kwargs: those of OLMo-core's ``AttentionBackend``.
    """

    def __init__(self, *, kernel: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernel = kernel
        self.cp_mesh: DeviceMesh | None = None

    def apply_cp(self, cp_mesh: DeviceMesh, ring: Any = None, uly: Any = None) -> None:
        """Split tokens over the ranks, in OLMo-core's zig-zag order (:mod:`.chunks`)."""
        del ring, uly
        self.cp_mesh, self.cp_enabled = cp_mesh, True

    def forward(self, qkv: Any, **context: Any) -> torch.Tensor:  # type: ignore[override]
        q, k, v = qkv
        if self.cp_mesh is not None:  # each of a rank's two chunks is a row
            rows = [x.reshape(2 * x.shape[0], -1, *x.shape[2:]) for x in (q, k, v)]
            past = past_chunks(k, v, self.cp_mesh)
            out = past_attention(rows[0], rows[1], rows[2], past, scale=self.scale, backend=self.kernel)
            return out.view(q.shape)
        more = any(x is not None for x in context.values())
        if self.kernel == "auto" and (more or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16)):
            return super().forward(qkv, **context)
        assert not more, "plain models have no document masks"
        result = moda_attention(q, k, v, scale=self.scale, backend=self.kernel)
        assert isinstance(result, torch.Tensor)
        return result


def use_operator(attention: Any, kernel: str, always: bool = False) -> None:
    """Let a plain model's attention call the operator: any backend that is asked for, ``auto`` where it is FlashAttention 4.

    Models with and without slots then run the same kernel over the sequence.

    :param always: ``auto`` wherever it is.
    """
    old = attention.backend
    if kernel == "auto" and not always:
        if not torch.cuda.is_available():
            return
        device = torch.device("cuda", torch.cuda.current_device())
        if sequence_kernel(device, torch.bfloat16, old.head_dim) != "flash_attn_4":
            return
    sizes = {name: getattr(old, name) for name in ("head_dim", "n_heads", "n_kv_heads", "scale", "cache")}
    attention.backend = OperatorBackend(kernel=kernel, **sizes)


@SequenceMixerConfig.register("depth_attention")
@dataclass
class DepthAttentionConfig(AttentionConfig):
    """OLMo-core's attention config for blocks with a depth mechanism.

    :param kernel: backend of the MoDA operator, which runs with and without depth slots.
    """

    kernel: str = "auto"

    def build(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> DepthAttention:
        """Build the attention of one layer.

        :raises ValueError: for options of OLMo-core's attention that are not supported here.
        """
        used = [name for name in _UNSUPPORTED if getattr(self, name)]
        if used:
            raise ValueError(f"a depth mechanism does not work together with attention option {', '.join(used)}")
        return DepthAttention(
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
            kernel=self.kernel,
        )


class DepthAttention(Attention):
    """Multi-head attention (GQA) in steps: the training side of :class:`moda.depth.mechanism.AttentionHost`.

    ``context`` may hold ``cu_doc_lens`` (int32 ``[N + 1]``, boundaries of the documents in the flattened batch) and ``mask``
    (bool ``[B, T, T]``: which keys each query sees, in place of the causal mask; for inference only). The state of a mechanism
    with slots is the depth stream's pair of tensors: the one that orders autograd, and the layer's row.

    :param kernel: backend of the MoDA operator.
    :param kwargs: those of OLMo-core's ``Attention``.
    """

    def __init__(self, *, kernel: str = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernel = kernel
        self.tp_mesh: DeviceMesh | None = None
        self.cp_mesh: DeviceMesh | None = None

    def apply_cp(self, cp_mesh: DeviceMesh, ring: Any = None, uly: Any = None) -> None:
        """Split tokens over the ranks, in OLMo-core's zig-zag order (:mod:`.chunks`)."""
        del ring, uly
        self.cp_mesh = cp_mesh

    def _rows(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """``[B, T, H, D]``, as the operator takes it.

        Packed documents are one row ``[1, B * T, H, D]``, and under context parallelism each of a rank's two chunks is a row.
        """
        if self.cp_mesh is not None:
            return x.reshape(2 * x.shape[0], -1, *x.shape[2:])
        return x if context.get("cu_doc_lens") is None else x.reshape(1, -1, *x.shape[2:])

    def apply_tp(self, tp_mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        """Split heads over the ranks. Inputs are local and hold all tokens (:mod:`.split`); the output is split by tokens."""
        del args, kwargs
        rows = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        parallelize_module(self, tp_mesh, {**{w: ColwiseParallel() for w in ("w_q", "w_k", "w_v")}, "w_out": rows})
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                distribute(norm, tp_mesh, Replicate() if self.use_head_qk_norm else Shard(0))
        self.tp_mesh = tp_mesh

    def linear(self, x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
        return joint_linear(x, *linears)

    def gain(self, norm: Any) -> torch.Tensor:
        return local(norm.weight)

    def project(self, x: Received) -> tuple[torch.Tensor, ...]:
        if isinstance(x, tuple):
            return tuple(linear(part) for linear, part in zip((self.w_q, self.w_k, self.w_v), x, strict=True))
        return joint_linear(x, self.w_q, self.w_k, self.w_v)

    def normalise(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        if self.use_head_qk_norm:
            x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            across = None if self.use_head_qk_norm else self.tp_mesh
            x = norm(x) if self.tp_mesh is None else rms_norm(x, norm, across)
        return x if self.use_head_qk_norm else x.unflatten(-1, (-1, self.head_dim))

    def rotate(self, q: torch.Tensor, k: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rope is None:
            return q, k
        assert isinstance(self.rope, RotaryEmbedding)
        places = {
            name: context[name] for name in ("cu_doc_lens", "pos_sin", "pos_cos") if context.get(name) is not None
        }
        return self.rope(q, k, head_first=False, **places)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
        if context.get("mask") is not None:
            return masked_attention(q, k, v, context["mask"])[0]
        assert self.cp_mesh is None
        rows = (self._rows(x, context) for x in (q, k, v))
        out = moda_attention(*rows, cu_seqlens=context.get("cu_doc_lens"), backend=self.kernel)
        assert isinstance(out, torch.Tensor)
        return out.view(q.shape)

    def attend_with_slots(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_depth: torch.Tensor | None,
        state: State,
        context: Context,
        top: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        order, row = state
        out, order = depth_attention(
            self._rows(q, context),
            self._rows(k, context),
            self._rows(v, context),
            order,
            row,
            q_depth=None if q_depth is None else self._rows(q_depth, context),
            cu_seqlens=context.get("cu_doc_lens"),
            mask=context.get("mask"),
            depth_top=top,
            depth_bias=bias,
            past=None if self.cp_mesh is None else past_chunks(k, v, self.cp_mesh),
        )
        return out.view(q.shape), (order, row)

    def attend_slots(
        self,
        q: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        state: State,
        context: Context,
        top: int | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        order, row = state
        pair = None if own is None else (self._rows(own[0], context), self._rows(own[1], context))
        out, order = slot_attention(self._rows(q, context), order, row, pair, depth_top=top, depth_bias=bias)
        return out.view(q.shape), (order, row)

    def write_slot(self, k: torch.Tensor, v: torch.Tensor, kind: int, state: State, context: Context) -> State:
        order, row = state
        return depth_write(order, self._rows(k, context), self._rows(v, context), row, kind), row

    def output(self, out: torch.Tensor) -> torch.Tensor:
        return self.w_out(out.flatten(2))

    def forward(  # type: ignore[override]
        self, x: Received, *, depth: DepthLayer, state: State, **context: Any
    ) -> tuple[torch.Tensor, State]:
        """What the mechanism makes of these steps: ``[B, T, d_model]`` and the next state. Checkpointing may wrap it."""
        return depth("attend", self, x, state, context)
