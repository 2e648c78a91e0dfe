"""The decoder that a model section describes: OLMo-core's transformer, with a depth mechanism if it has one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import Transformer, TransformerConfig
from olmo_core.nn.transformer.init import init_linear
from olmo_core.utils import mark_dynamic
from torch.distributed import DeviceMesh

from moda.config.model import ModelConfig
from moda.depth.mechanism import State
from moda.typed import to_dict
from moda_kernels import DepthLayout, DepthStream, receive_slots, send_slots
from moda_kernels.sources import Sources, fastest

from .attention import DepthAttentionConfig
from .block import DepthBlock, ModelBlockConfig
from .lm_head import PaddedLMHeadConfig
from .stages import Stage

__all__ = ["DepthTransformer", "ModelTransformerConfig", "transformer_config"]

log = logging.getLogger(__name__)


def transformer_config(model: ModelConfig, vocab_size: int | None = None) -> ModelTransformerConfig:
    """OLMo-core's form of a model.

    :param vocab_size: the tokenizer's, used where the section's is null.

    :raises UserError: where neither is known.
    """
    rows = model.rows(vocab_size)
    norm = LayerNormConfig(name=LayerNormType.rms, eps=model.norm_eps, bias=False)
    mixer: dict[str, Any] = dict(
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        bias=model.bias,
        rope=RoPEConfig(theta=model.rope_theta),
        qk_norm=None if model.qk_norm.value == "none" else norm,
        use_head_qk_norm=True if model.qk_norm.value == "head" else None,
    )
    if model.depth is None:
        attention: AttentionConfig = AttentionConfig(**mixer)
    else:
        attention = DepthAttentionConfig(**mixer, kernel=model.attention_backend.value)
    return ModelTransformerConfig(
        d_model=model.d_model,
        vocab_size=rows,
        n_layers=model.n_layers,
        block=ModelBlockConfig(
            section=to_dict(model),
            sequence_mixer=attention,
            feed_forward=FeedForwardConfig(hidden_size=model.ffn_hidden_size, bias=model.bias, dtype=DType.float32),
            layer_norm=norm,
        ),
        lm_head=PaddedLMHeadConfig(
            layer_norm=norm, bias=False, padding=rows - cast(int, model.vocab_size or vocab_size)
        ),
        tie_word_embeddings=model.tie_embeddings,
        init_std=model.init_std,
    )


@dataclass
class ModelTransformerConfig(TransformerConfig):
    """OLMo-core's transformer config of a model section; see :func:`transformer_config`.

    ``vocab_size`` counts the rows of the embedding, ``lm_head.padding`` of them padding.
    """

    block: ModelBlockConfig = field(default=cast(ModelBlockConfig, None))
    lm_head: PaddedLMHeadConfig = field(default_factory=PaddedLMHeadConfig)

    def __post_init__(self) -> None:
        if self.block is None:
            raise OLMoConfigurationError("ModelTransformerConfig needs a block")
        super().__post_init__()

    @property
    def model(self) -> ModelConfig:
        """The section."""
        return self.block.model

    @property
    def query_width(self) -> int:
        """Hq * D."""
        assert self.model.head_dim is not None
        return self.model.n_heads * self.model.head_dim

    @property
    def num_depth_params(self) -> int:
        """Parameters of the depth mechanism."""
        return 0 if self.model.depth is None else self.model.depth.num_params(self.model)

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

    def _depth_flops(self) -> int:
        """Forward FLOPs per token of the depth mechanism, besides its parameters' matrix products."""
        return 0 if self.model.depth is None else self.model.depth.forward_flops_per_token(self.model)

    def num_flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs per token (forward + backward), causal attention counted half, as OLMo-core counts."""
        positions = seq_len * (seq_len + 1) // 2
        assert self.lm_head.layer_norm is not None and self.block.feed_forward is not None
        head_params = self.d_model * self.vocab_size + self.lm_head.layer_norm.num_params(self.d_model)
        block_params = self.block.sequence_mixer.num_params(self.d_model)
        block_params += self.block.feed_forward.num_params(self.d_model)
        flops = 6 * (self.n_layers * block_params + head_params + self.num_depth_params)
        return flops + self.n_layers * (12 * self.query_width * positions // seq_len) + 3 * self._depth_flops()

    def paper_forward_flops(self, seq_len: int, *, causal: bool = False) -> int:
        """Forward FLOPs of one sequence as the paper's tables count them.

        Table 3: ``seq_len`` 4096 and the full attention square; Table 6: 512 and the square halved (``causal``). The paper
        prints 0.7 % more than this formula gives.
        """
        square = 4 * seq_len**2 * self.query_width * self.n_layers
        flops = 2 * self.num_counted_params * seq_len + (square // 2 if causal else square)
        return flops + seq_len * self._depth_flops()

    def build(self, *, init_device: str = "cpu") -> Transformer:
        """Build the model: a :class:`DepthTransformer`, or OLMo-core's ``Transformer`` without a depth mechanism."""
        kwargs: dict[str, Any] = dict(
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
        model = Transformer(**kwargs) if self.model.depth is None else DepthTransformer(config=self, **kwargs)
        assert model.num_params == self.num_params, (model.num_params, self.num_params)
        log.info("Built a model of %s parameters", f"{model.num_params:,d}")
        return model


class _StreamSlots:
    """The slot memory of training and evaluation: a depth stream, whose kernels the attention calls.

    It is the :class:`moda.depth.mechanism.Host` of one forward pass, and the :class:`moda.depth.mechanism.SlotMemory` that this
    opens. Blocks get the tensor that orders autograd and the layer's row.

    :param stage: the stage of a pipeline that the pass goes through; None for a whole model.
    :param received: the slots that it is given, as :func:`moda_kernels.send_slots` has them.
    """

    def __init__(self, backend: str, stage: Stage | None, received: torch.Tensor | None) -> None:
        self.backend, self.stage, self.received = backend, stage, received

    def open_slots(self, layout: DepthLayout, device: torch.device) -> _StreamSlots:
        stage = self.stage
        self.stream = DepthStream(layout if stage is None else layout.part(stage.first, stage.end), self.backend)
        self.order = self.stream.start(device)
        if stage is not None and self.received is not None:
            self.order = receive_slots(self.order, self.received, self.stream, stage.first)
        return self

    def open_sources(self, n: int, device: torch.device) -> Sources:
        return Sources(n, fastest, device)

    def enter(self, layer: int) -> State:
        return self.order, self.stream.layer_rows[layer]

    def leave(self, layer: int, state: State) -> None:
        self.order = state[0]

    def sent(self) -> tuple[torch.Tensor, ...]:
        """What later stages need of the slots, if they need any."""
        slots = send_slots(self.order, self.stream) if hasattr(self, "stream") else None
        return () if slots is None else (slots,)


class DepthTransformer(Transformer):
    """OLMo-core's transformer with a depth mechanism.

    :param config: what the model was built from.
    :param kwargs: those of OLMo-core's ``Transformer``.
    """

    def __init__(self, *, config: ModelTransformerConfig, init_device: str = "cpu", **kwargs: Any) -> None:
        super().__init__(init_device=init_device, **kwargs)
        self.config = config
        mechanism = config.model.depth
        assert mechanism is not None
        self.mechanism = mechanism
        self.stage: Stage | None = None
        with torch.device(init_device):
            self.depth = mechanism.build_model(config.model)
        for name in ("num_params", "num_non_embedding_params"):  # OLMo-core cached them without the mechanism's
            vars(self).pop(name, None)

    @property
    def shares_prefix(self) -> bool:
        """Whether several continuations of one text may share a row under ``mask``."""
        return self.mechanism.refuses("shared_prefix") is None

    def forward(  # type: ignore[override]
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
        slots: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | LMOutputWithLoss | tuple[torch.Tensor, ...]:
        """Run the model; arguments and results are those of OLMo-core's ``Transformer``.

        :param input_ids: ``[B, T]`` token ids.
        :param labels: ``[B, T]`` labels, for the loss.
        :param mask: bool ``[B, T, T]``, which tokens each token sees, in place of the causal mask; for inference only.
        :param slots: the slots that a stage of a pipeline receives, ``[2 S, B, T, Hk, D]``.

        :returns: logits ``[B, T, vocab]``, or the losses if ``labels`` is given. A stage before the last (:mod:`.stages`) gives
            hidden states ``[B, T, d_model]`` and, if there are any to be sent, slots.
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
        memory = _StreamSlots(self.config.model.attention_backend.value, self.stage, slots)
        stream, forward_pass = self.depth.begin(h, memory)
        for index, block in self.blocks.items():
            layer = int(index)
            stream, state = forward_pass.enter(layer, stream)
            self._mark_dynamic(stream)
            stream, state = block(stream, state=state, **all_block_kwargs, **per_block_kwargs.get(layer, {}))
            stream = forward_pass.leave(layer, stream, state)
        if self.lm_head is None:
            return stream, *memory.sent()
        h = forward_pass.finish(stream)
        self._mark_dynamic(h)
        if labels is not None:
            self._mark_dynamic(labels)
            lm_head_kwargs["labels"] = labels
        return self.lm_head(h, **lm_head_kwargs)

    def _mark_dynamic(self, x: Any) -> None:
        """Compile for any batch size and length: of ``[B, T]``, ``[B, T, d]``, ``[n, B, T, d]``, and tuples of them."""
        if isinstance(x, tuple):
            for part in x:
                self._mark_dynamic(part)
        elif self.compile_enabled and x.ndim > 1:
            batch = max(0, x.ndim - 3)
            mark_dynamic(x, (batch, batch + 1), strict=False)

    @torch.no_grad()
    def init_weights(self, **kwargs: Any) -> torch.Generator:  # type: ignore[override]
        """Initialise like OLMo-core; a mechanism's linears like every other linear, its other parameters as it says."""
        generator = super().init_weights(**kwargs)
        for part in (*(cast(DepthBlock, block).depth for block in self.blocks.values()), self.depth):
            for module in part.modules():
                if isinstance(module, torch.nn.Linear):
                    init_linear(module, std=self.init_std, generator=generator)
        return generator

    def num_flops_per_token(self, seq_len: int) -> int:
        return self.config.num_flops_per_token(seq_len)

    def apply_fsdp(self, *args: Any, **kwargs: Any) -> None:
        """Apply FSDP2, block by block.

        :raises OLMoConfigurationError: for the strategy that wraps the attention apart from its block: both share its norms.
        """
        if str(kwargs.get("wrapping_strategy", "full")) == "fine_grained":
            raise OLMoConfigurationError("a depth mechanism works with the FSDP wrapping strategies full and blocks")
        super().apply_fsdp(*args, **kwargs)

    def apply_pp(self, pp_mesh: DeviceMesh) -> None:
        """Prepare a stage.

        :raises OLMoConfigurationError: for a mechanism whose state is more than slots.
        """
        if (reason := self.mechanism.refuses("pipeline_parallel")) is not None:
            raise OLMoConfigurationError(f"model.depth does not work with pipeline parallelism: {reason}")
        super().apply_pp(pp_mesh)
