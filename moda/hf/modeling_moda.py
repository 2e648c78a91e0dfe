"""An exported model for ``AutoModelForCausalLM`` (remote code: its folder holds every file that it imports)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from moda.depth.mechanism import DepthLayer, DepthModel

from .configuration_moda import MoDAConfig
from .decoder_moda import Cache, DecoderParts, MoDARMSNorm


class MoDAPreTrainedModel(PreTrainedModel):
    """Weights, saving and loading."""

    config_class = MoDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["MoDALayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, MoDARMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (DepthLayer, DepthModel)):
            module.reset_parameters()


class MoDAModel(DecoderParts, MoDAPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__(config)
        self.build(config.section(), config.round_slots)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of ids ``[B, T]``; with a cache these are the new tokens only.

        ``output_hidden_states`` gives the residual stream before each block and the final norm's output, ``output_attentions``
        each layer's probabilities ``[B, Hq, T, keys + S]``, whose last S columns are the depth slots that the layer reads.

        :raises ValueError: unless exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        del kwargs
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MoDAModel: expected exactly one of input_ids and inputs_embeds")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        streams: list[Any] | None = [] if output_hidden_states else None
        attentions: list[Any] | None = [] if output_attentions else None
        cache = past_key_values if use_cache else None
        hidden = self.run(embedded, attention_mask, position_ids, cache, streams, attentions)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,  # type: ignore[arg-type]
            past_key_values=past_key_values if use_cache else None,  # type: ignore[arg-type]
            hidden_states=None if streams is None else (*streams, hidden),  # type: ignore[arg-type]
            attentions=None if attentions is None else tuple(attentions),
        )


class MoDAForCausalLM(MoDAPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__(config)
        self.model = MoDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits ``[B, T, vocab]``; ``labels`` (shifted inside, -100 left out) add the mean loss.

        Under transformers' ``Trainer`` the loss is divided by ``num_items_in_batch``, the labels of all accumulation steps.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return out.to_tuple() if return_dict is False else out
