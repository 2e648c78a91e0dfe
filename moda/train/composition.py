"""What a run was trained on: ``data.json`` in the run folder, planned at the start and counted at the end."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.train.callbacks import Callback

from moda.data.mixture import Drawn
from moda.files import write_json

from .environment import on_first_rank

COMPOSITION_FILE = "data.json"
_BLOCK = 1 << 22


def count_drawn(loader: Any, labels: list[str], tokens: int) -> dict[str, int]:
    """Tokens of each source in the first ``tokens`` of training, counted from the loader's own order. All ranks must call it.

    :param loader: OLMo-core's loader of fixed-length sequences. It is left as it is.
    :param labels: the source of every path of its dataset.
    """
    dataset = loader.dataset
    sequences = tokens // dataset.sequence_length
    ends = np.array([end for _, end in dataset.offsets], dtype=np.int64)
    names = list(dict.fromkeys(labels))
    of_path = np.array([names.index(label) for label in labels], dtype=np.int64)
    counts = np.zeros(len(names), dtype=np.int64)
    ordered = copy.copy(loader)
    for epoch in range(1, -(-sequences // loader.total_size) + 1):
        ordered.reshuffle(epoch)  # a file in the work folder, written when the epoch began
        order = ordered.get_global_indices()[: min(sequences - (epoch - 1) * loader.total_size, loader.total_size)]
        for start in range(0, len(order), _BLOCK):  # a 400B-token run has 98 million sequences
            paths = np.searchsorted(ends, order[start : start + _BLOCK], side="right")
            counts += np.bincount(of_path[paths], minlength=len(names))
    return {name: int(n) * dataset.sequence_length for name, n in zip(names, counts)}


@dataclass
class CompositionCallback(Callback):
    """Writes ``data.json``: the sources, what the run was to draw from each, and what it has drawn when it ends.

    :param folder: the run folder.
    :param drawn: the plan.
    :param labels: the source of every path of the dataset.
    """

    folder: str = ""
    drawn: list[Drawn] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def _write(self, trained: dict[str, int]) -> None:
        total = sum(d.tokens or 0 for d in self.drawn)
        content: dict[str, Any] = {"dataset": [d.describe(total) for d in self.drawn]}
        if trained:
            tokens = sum(trained.values())
            shares = {name: {"tokens": n, "share": n / tokens} for name, n in trained.items()}
            content["trained_on"] = {"steps": self.step, "tokens": tokens, "sources": shares}
        on_first_rank(lambda: write_json(Path(self.folder) / COMPOSITION_FILE, content))

    def pre_train(self) -> None:
        self._write({})

    def post_train(self) -> None:
        if self.step > 0:
            self._write(count_drawn(self.trainer.data_loader, self.labels, self.trainer.global_train_tokens_seen))
