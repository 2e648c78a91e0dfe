"""Transformer blocks: a norm placement, and a depth mechanism's part."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.transformer import TransformerBlock, TransformerBlockConfig, TransformerBlockType
from olmo_core.nn.transformer.block import TransformerBlockBase
from torch.distributed import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

from moda.config.model import ModelConfig
from moda.depth.mechanism import DepthLayer, State
from moda.placements import NormPlacement
from moda.placements.placement import Add, Norms, receive_each
from moda.typed import from_dict

from .attention import use_operator
from .split import distribute, whole

__all__ = ["DepthBlock", "ModelBlockConfig", "PlacedBlock"]


@dataclass
class ModelBlockConfig(TransformerBlockConfig):
    """A block of a model. A plain one whose norm placement OLMo-core has is built by OLMo-core itself.

    :param section: the model's section in its plain form, which OLMo-core can serialise.
    """

    section: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The model's section."""
        return from_dict(ModelConfig, self.section, "model")

    def build(
        self,
        *,
        d_model: int,
        block_idx: int,
        n_layers: int,
        init_device: str = "cpu",
        cache: BufferCache | None = None,
    ) -> TransformerBlockBase:
        assert self.feed_forward is not None and self.layer_norm is not None
        parts: dict[str, Any] = dict(
            sequence_mixer=self.sequence_mixer, feed_forward=self.feed_forward, layer_norm=self.layer_norm
        )
        place: dict[str, Any] = dict(d_model=d_model, block_idx=block_idx, n_layers=n_layers)
        place.update(init_device=init_device, cache=cache)
        if self.model.depth is not None:
            with torch.device(init_device):
                depth = self.model.depth.build_layer(self.model, block_idx)
            return DepthBlock(depth=depth, placement=self.model.norm_placement, **parts, **place)
        if self.model.norm_placement.olmo_core_block is not None:
            name = TransformerBlockType(self.model.norm_placement.olmo_core_block)
            block = TransformerBlockConfig(name=name, **parts).build(**place)
        else:
            block = PlacedBlock(placement=self.model.norm_placement, **parts, **place)
        use_operator(block.attention, self.model.attention_backend.value)
        return block

    def num_params(self, d_model: int) -> int:
        """Parameters of one block without those of its depth mechanism."""
        assert self.layer_norm is not None
        plain = TransformerBlockConfig.num_params(replace(self, name=TransformerBlockType.default), d_model)
        return plain + 2 * (len(self.model.norm_placement.norms) - 1) * self.layer_norm.num_params(d_model)


class PlacedBlock(TransformerBlock):
    """OLMo-core's block with any norm placement. Submodules are named as OLMo-core names them."""

    def __init__(self, *, placement: NormPlacement, layer_norm: LayerNormConfig, **kwargs: Any) -> None:
        super().__init__(layer_norm=layer_norm, **kwargs)
        self.placement = placement
        for name in (*placement.norm_names("attention"), *placement.norm_names("feed_forward")):
            if not hasattr(self, name):
                self.add_module(name, layer_norm.build(self.d_model, init_device=kwargs["init_device"]))

    def norms(self, sublayer: str) -> Norms:
        """The norms of ``attention`` or ``feed_forward``."""
        return [getattr(self, name) for name in self.placement.norm_names(sublayer)]

    def forward(self, x: torch.Tensor, *, loss_div_factor: Any = None, **kwargs: Any) -> torch.Tensor:
        del loss_div_factor

        def sublayer(name: str, f: Any, x: torch.Tensor, add: Add) -> torch.Tensor:
            norms = self.norms(name)
            return self.placement.combine(x, f(self.placement.receive(x, norms)), norms, add)

        h = sublayer("attention", functools.partial(self.attention, **kwargs), x, self.attention_residual_stream)
        return sublayer("feed_forward", self.feed_forward, h, self.feed_forward_residual_stream)


class DepthBlock(PlacedBlock):
    """A block whose sublayers go through a depth mechanism.

    :param depth: the mechanism's part of this block.
    """

    def __init__(self, *, depth: DepthLayer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth
        self.splits = False  # heads, over the ranks of tensor parallelism

    def forward(  # type: ignore[override]
        self, stream: Any, *, state: State, loss_div_factor: Any = None, **context: Any
    ) -> tuple[Any, State]:
        """Run the block.

        :param stream: the residual stream, ``[B, T, d_model]`` unless the mechanism has another.
        :param state: what the mechanism hands to this block.
        :param context: see :class:`moda.model.attention.DepthAttention`.

        :returns: the stream and the state after the block.
        """
        del loss_div_factor
        for name in ("attention", "feed_forward"):
            norms = self.norms(name)
            received, kept = self.depth("before", name, stream)
            x = receive_each(self.placement, received, norms)
            ffn: Any = self.feed_forward
            if self.splits:
                gathered, x = whole(x)
                ffn = functools.partial(self._split_ffn, gathered)
            if name == "attention":
                out, state = self.attention(x, depth=self.depth, state=state, **context)
            else:
                out, state = self.depth("feed_forward", ffn, self.attention, x, state, context)
            add = functools.partial(self._add, name, kept)
            stream = self.placement.combine(stream, out, norms, add)
        return stream, state

    def _add(self, sublayer: str, kept: State, stream: Any, out: torch.Tensor) -> Any:
        return self.depth("after", sublayer, stream, out, kept)

    def _split_ffn(self, gathered: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The FFN of the tensor whose local form ``x`` is: OLMo-core splits it, and takes distributed tensors."""
        del x
        return self.feed_forward(gathered)

    def apply_tp(self, tp_mesh: DeviceMesh, *, input_layout: Placement, float8_enabled: bool = False) -> None:
        """Split heads, with their slots, and the FFN over the ranks, and tokens between sublayers (:mod:`.split`)."""
        assert input_layout == Shard(1) and not float8_enabled
        self.attention.apply_tp(tp_mesh)
        by_heads = self.depth.split_by_heads()
        for module in self.depth.modules():
            if module in by_heads:
                parallelize_module(module, tp_mesh, ColwiseParallel())
            else:
                distribute(module, tp_mesh, Replicate())
        for norm in (*self.norms("attention"), *self.norms("feed_forward")):
            parallelize_module(cast(torch.nn.Module, norm), tp_mesh, SequenceParallel())
        self.feed_forward.apply_tp(tp_mesh, input_layout=Shard(1), output_layout=Shard(1), use_local_output=False)
        self.splits = True
