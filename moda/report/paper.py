"""The rows of the paper's Tables 3 and 6 (arXiv 2603.15619), and which of them a run is.

Table 3: 700M models, 400 B tokens of the OLMo2 mix. Table 6: small models on FineWeb-Edu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PAPER_TABLES", "PaperTable"]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    :param settings: in a run's configuration, what all its rows share.
    :param keys: what tells the rows apart.
    :param figures: what is printed for each row.
    :param validation: the start of its validation set's name.
    :param rows: name and keys' values of each row, and its figures.
    """

    title: str
    settings: dict[str, Any]
    keys: tuple[str, ...]
    figures: tuple[str, ...]
    validation: str
    rows: dict[tuple[str, tuple[Any, ...]], tuple[float, ...]]

    def row(self, settings: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
        """Which row a run with these settings is."""
        if any(settings.get(key) != value for key, value in self.settings.items()):
            return None
        values = tuple(settings.get(key) for key in self.keys)
        return next((row for row in self.rows if row[1] == values), None)


_DEPTH = ("model.depth", "model.depth.attention", "model.depth.ffn")
_NONE, _KV, _FFN, _PROJECTED = (None,) * 3, ("moda", "reuse", False), ("moda", "reuse", True), ("moda", "project", True)
_SHAPE = ("model.d_model", "model.n_heads", "model.n_kv_heads", "model.ffn_hidden_size")

PAPER_TABLES = (
    PaperTable(
        "Table 3 (700M models, 400 B tokens)",
        dict(zip(_SHAPE, (1024, 16, 8, 4096))),
        ("model.n_layers", *_DEPTH),
        ("parameters, M", "forward TFLOPs", "training perplexity", "validation perplexity (C4)", "downstream mean, %"),
        "c4",
        {
            ("OLMo2, 36 layers", (36, *_NONE)): (669.0, 8.01, 14.49, 18.59, 56.93),
            ("OLMo2, 38 layers", (38, *_NONE)): (700.5, 8.41, 14.27, 18.31, 57.11),
            ("depth KV", (36, *_KV)): (669.0, 8.02, 14.08, 18.48, 58.10),
            ("depth KV, FFN KV", (36, *_FFN)): (705.7, 8.33, 13.90, 18.21, 58.87),
            ("depth KV, FFN KV, attention KV projection", (36, *_PROJECTED)): (742.4, 8.63, 13.83, 18.17, 58.97),
        },
    ),
    PaperTable(
        "Table 6 (layers and norm placement)",
        dict(zip(_SHAPE, (384, 6, 2, 1536))),
        ("model.n_layers", "model.norm_placement", *_DEPTH),
        ("parameters, M", "forward GFLOPs", "validation loss (FineWeb-Edu)"),
        "fineweb",
        {
            ("48 layers, pre-norm, OLMo2", (48, "pre", *_NONE)): (123.38, 136.61, 3.3800),
            ("48 layers, post-norm, OLMo2", (48, "post", *_NONE)): (123.38, 136.61, 3.4062),
            ("48 layers, pre-norm, depth KV", (48, "pre", *_KV)): (123.38, 137.89, 3.3759),
            ("48 layers, post-norm, depth KV", (48, "post", *_KV)): (123.38, 137.89, 3.3653),
            ("48 layers, pre-norm, depth KV, FFN KV", (48, "pre", *_FFN)): (128.11, 144.00, 3.3656),
            ("48 layers, post-norm, depth KV, FFN KV", (48, "post", *_FFN)): (128.11, 144.00, 3.3484),
            ("24 layers, post-norm, OLMo2", (24, "post", *_NONE)): (71.35, 78.19, 3.4740),
            ("24 layers, post-norm, depth KV", (24, "post", *_KV)): (71.35, 78.51, 3.4537),
            ("24 layers, post-norm, depth KV, FFN KV", (24, "post", *_FFN)): (73.72, 81.24, 3.4338),
        },
    ),
)
