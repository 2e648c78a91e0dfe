"""Pretraining of language models with Mixture-of-Depths Attention (MoDA, arXiv 2603.15619)."""

import logging

__version__ = "0.1.0"

# OLMo-core warns at import that an optional attention library is absent; it is not one that this project uses.
logging.getLogger("olmo_core.nn.attention.te_attn_api").setLevel(logging.ERROR)
