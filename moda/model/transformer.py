"""The decoder: OLMo-core's transformer, with one depth stream per forward pass."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.nn.transformer import Transformer, TransformerConfig
from olmo_core.utils import mark_dynamic

from moda_kernels import DepthLayout, DepthStream
from moda_kernels.depth_stream import ATTENTION, FFN

from .attention import MoDAAttentionConfig
from .block import MoDABlock, MoDABlockConfig
from .depth_kv import DepthAttention, DepthKVConfig, DepthProjection
from .lm_head import PaddedLMHeadConfig

__all__ = ["MoDATransformer", "MoDATransformerConfig"]

log = logging.getLogger(__name__)


@dataclass
class MoDATransformerConfig(TransformerConfig):
    """OLMo-core's transformer config with depth KV; without it the model is OLMo-core's own.

    ``vocab_size`` counts the rows of the embedding, ``lm_head.padding`` of them padding.

    :param attention_backend: backend of the MoDA operator (``auto``, ``reference``, ``fused``, ``split``).
    """

    block: MoDABlockConfig = field(default=cast(MoDABlockConfig, None))
    lm_head: PaddedLMHeadConfig = field(default_factory=PaddedLMHeadConfig)
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        if self.block is None:
            raise OLMoConfigurationError("MoDATransformerConfig needs a block")
        super().__post_init__()

    @property
    def depth_kv(self) -> DepthKVConfig | None:
        """The depth stream's form, or None for a plain model."""
        mixer = self.block.sequence_mixer
        return mixer.depth_kv if isinstance(mixer, MoDAAttentionConfig) else None

    @property
    def attention(self) -> Any:
        """The attention's config."""
        return self.block.sequence_mixer

    @property
    def kv_width(self) -> int:
        """Hk * D."""
        mixer = self.attention
        return (mixer.n_kv_heads or mixer.n_heads) * (mixer.head_dim or self.d_model // mixer.n_heads)

    @property
    def query_width(self) -> int:
        """Hq * D."""
        mixer = self.attention
        return mixer.n_heads * (mixer.head_dim or self.d_model // mixer.n_heads)

    @property
    def layout(self) -> DepthLayout | None:
        """Which slots the layers write and read, or None for a plain model."""
        return None if self.depth_kv is None else self.depth_kv.layout(self.n_layers)

    @property
    def n_depth_projections(self) -> int:
        """How many K/V projection pairs the depth stream adds to the model."""
        layout, depth_kv = self.layout, self.depth_kv
        if layout is None or depth_kv is None:
            return 0
        kinds = [FFN] + ([ATTENTION] if depth_kv.attention == DepthAttention.project else [])
        return sum(layout.written_slot(layer, kind) is not None for layer in range(self.n_layers) for kind in kinds)

    @property
    def num_depth_params(self) -> int:
        """Parameters of the depth projections."""
        bias = True if self.attention.bias is None else self.attention.bias
        return self.n_depth_projections * DepthProjection.num_params(self.d_model, self.kv_width, bias)

    @property
    def num_padding_params(self) -> int:
        """Parameters of the rows that only pad the vocabulary."""
        return self.lm_head.padding * self.d_model * (1 if self.tie_word_embeddings else 2)

    @property
    def num_params(self) -> int:
        """All parameters of the built model, padding rows included."""
        return super().num_params + self.num_depth_params

    @property
    def num_active_params(self) -> int:
        return super().num_active_params + self.num_depth_params

    @property
    def num_counted_params(self) -> int:
        """Parameters as the paper counts them: without padding rows."""
        return self.num_params - self.num_padding_params

    def num_flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs a token (forward + backward), causal attention counted half: equal to the built model's."""
        positions = seq_len * (seq_len + 1) // 2
        head_params = self.d_model * self.vocab_size + (
            0 if self.lm_head.layer_norm is None else self.lm_head.layer_norm.num_params(self.d_model)
        )
        block_params = self.attention.num_params(self.d_model)
        assert self.block.feed_forward is not None
        block_params += self.block.feed_forward.num_params(self.d_model)
        flops = 6 * (self.n_layers * block_params + head_params + self.num_depth_params)
        flops += self.n_layers * (12 * self.query_width * positions // seq_len)
        if self.layout is not None:
            flops += 12 * self.query_width * self.layout.slots_read
        return flops

    def paper_forward_flops(self, seq_len: int, *, causal: bool = False) -> int:
        """Forward FLOPs of one sequence as the paper's tables count them.

        Table 3: ``seq_len`` 4096 and the full attention square; Table 6: 512 and the square halved (``causal``). The paper
        prints 0.7 % more than this formula gives.
        """
        square = 4 * seq_len**2 * self.query_width * self.n_layers
        flops = 2 * self.num_counted_params * seq_len + (square // 2 if causal else square)
        if self.layout is not None:
            flops += 4 * seq_len * self.query_width * self.layout.slots_read
        return flops

    def build(self, *, init_device: str = "cpu") -> Transformer:
        """Build the model: a :class:`MoDATransformer`, or OLMo-core's ``Transformer`` where ``depth_kv`` is absent."""
        kwargs: dict = dict(
            d_model=self.d_model,
            vocab_size=self.vocab_size,
            n_layers=self.n_layers,
            block=self.block,
            lm_head=self.lm_head,
            dtype=self.dtype.as_pt(),
            init_method=self.init_method,
            init_device=init_device,
            init_seed=self.init_seed,
            init_std=self.init_std,
            tie_word_embeddings=self.tie_word_embeddings,
        )
        model: Transformer
        if self.layout is None:
            model = Transformer(**kwargs)
        else:
            model = MoDATransformer(layout=self.layout, attention_backend=self.attention_backend, **kwargs)
        assert model.num_params == self.num_params, (model.num_params, self.num_params)
        log.info("Built a model of %s parameters", f"{model.num_params:,d}")
        return model


class MoDATransformer(Transformer):
    """OLMo-core's transformer whose blocks read and write a depth stream.

    :param layout: which slots the layers write and read.
    :param attention_backend: backend of the MoDA operator.
    :param kwargs: those of OLMo-core's ``Transformer``.
    """

    def __init__(self, *, layout: DepthLayout, attention_backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layout = layout
        self.attention_backend = attention_backend

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        input_embeddings: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        ignore_index: int = -100,
        loss_reduction: Literal["mean", "sum", "none"] = "mean",
        z_loss_multiplier: float | None = None,
        loss_div_factor: torch.Tensor | float | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | LMOutputWithLoss:
        """Run the model; arguments and results are those of OLMo-core's ``Transformer``.

        :param input_ids: ``[B, T]`` token ids.
        :param labels: ``[B, T]`` labels, for the loss.
        :param mask: bool ``[B, T, T]``, which tokens each token sees, in place of the causal mask; for inference only.

        :returns: logits ``[B, T, vocab]``, or the losses if ``labels`` is given.
        """
        input_ids, labels, all_block_kwargs, per_block_kwargs, lm_head_kwargs = self._prepare_inputs(
            input_ids,
            labels,
            ignore_index=ignore_index,
            loss_reduction=loss_reduction,
            z_loss_multiplier=z_loss_multiplier,
            loss_div_factor=loss_div_factor,
            return_logits=return_logits,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if mask is not None:
            all_block_kwargs["mask"] = mask
        h = self.embeddings(input_ids) if input_embeddings is None else input_embeddings.to(self.device)
        stream = DepthStream(self.layout, self.attention_backend)
        token = stream.start(h.device)
        for index, block in self.blocks.items():
            layer = int(index)
            if self.compile_enabled:
                mark_dynamic(h, (0, 1), strict=False)
            h, token = block(
                h, token=token, control=stream.control[layer], **all_block_kwargs, **per_block_kwargs.get(layer, {})
            )
        if self.compile_enabled:
            mark_dynamic(h, (0, 1), strict=False)
            if labels is not None:
                mark_dynamic(labels, (0, 1), strict=False)
        if labels is not None:
            lm_head_kwargs["labels"] = labels
        return self.lm_head(h, **lm_head_kwargs)

    @torch.no_grad()
    def init_weights(self, **kwargs: Any) -> torch.Generator:  # type: ignore[override]
        """Initialise like OLMo-core, and the depth projections of the FFNs like every other linear."""
        generator = super().init_weights(**kwargs)
        for block in self.blocks.values():
            cast(MoDABlock, block).init_depth_weights(std=self.init_std, generator=generator)
        return generator

    def apply_fsdp(self, *args: Any, **kwargs: Any) -> None:
        """Apply FSDP2, block by block.

        :raises OLMoConfigurationError: for the strategy that wraps attention apart from its block, whose norm both share.
        """
        if str(kwargs.get("wrapping_strategy", "full")) == "fine_grained":
            raise OLMoConfigurationError("depth_kv works with the FSDP wrapping strategies full and blocks")
        super().apply_fsdp(*args, **kwargs)

    def apply_pp(self, *args: Any, **kwargs: Any) -> None:
        raise OLMoConfigurationError(
            "depth_kv does not work with pipeline parallelism: the depth stream would cross stages"
        )
