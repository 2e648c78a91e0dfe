"""Configuration of an exported model (remote code: its folder holds every file that it imports)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from moda.config.model import ModelConfig
from moda.typed import from_dict


def _of_section(key: str) -> property:
    """An attribute that transformers asks for, kept in the model section only."""
    return property(lambda self: self.model.get(key), lambda self, value: self.model.__setitem__(key, value))


class MoDAConfig(PretrainedConfig):
    """A decoder as a ``model`` section describes it: OLMo2-like, with a depth mechanism such as MoDA (arXiv 2603.15619) or none.

    :param model: the ``model`` section of the run's configuration, as it is.
    :param round_slots: whether depth slots are rounded to fp8 where the section says that they were in training.
    :param max_position_embeddings: tokens of the sequences that the model was trained on.
    """

    model_type = "moda"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size = _of_section("vocab_size")
    hidden_size = _of_section("d_model")
    num_hidden_layers = _of_section("n_layers")
    num_attention_heads = _of_section("n_heads")
    num_key_value_heads = _of_section("n_kv_heads")
    head_dim = _of_section("head_dim")
    intermediate_size = _of_section("ffn_hidden_size")
    tie_word_embeddings = _of_section("tie_embeddings")
    initializer_range = _of_section("init_std")

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        round_slots: bool = False,
        **kwargs: Any,
    ) -> None:
        self.model = dict(model or {})
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.round_slots = round_slots
        super().__init__(**kwargs)  # type: ignore[call-arg]

    def section(self) -> ModelConfig:
        """The checked model section."""
        return from_dict(ModelConfig, self.model, "model")
