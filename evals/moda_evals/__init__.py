"""Perplexity and downstream evaluation."""

import moda as moda  # first: it quiets a warning that OLMo-core gives when it is imported
