"""Hugging Face: export of checkpoints, import back again, and the modelling files that an exported folder carries.

``decoder_moda.py``, ``configuration_moda.py`` and ``modeling_moda.py`` are copied into exported folders, with the depth
mechanisms, norm placements and the model section that they import (:mod:`.bundle`): torch and transformers are all that
they need.
"""

from __future__ import annotations

from .convert import Export, from_hf, read_export, section_of, to_hf, write_checkpoint, write_export

__all__ = ["Export", "from_hf", "read_export", "register", "section_of", "to_hf", "write_checkpoint", "write_export"]


def register() -> None:
    """Teach ``transformers``' auto classes this project's model, so that a folder's own code is never needed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .configuration_moda import MoDAConfig
    from .modeling_moda import MoDAForCausalLM

    AutoConfig.register("moda", MoDAConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoDAConfig, MoDAForCausalLM, exist_ok=True)
