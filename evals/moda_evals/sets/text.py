"""Documents of local text, tokenized as training data is: no special tokens inside, the end token at the end."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moda.data.text import read_documents

from ..model import ModelInfo
from .base import DocumentSet, OpenSet, TokenDocument


@dataclass(frozen=True)
class Text(DocumentSet):
    """``--text NAME=PATH``: files, folders, globs, ``.jsonl`` with a ``text`` field."""

    sources: tuple[str, ...]

    def open(self, model: ModelInfo, base_dir: str | None = None) -> OpenSet:
        tokenizer = model.tokenizer
        for source in self.sources:
            next(read_documents([source]), None)  # complains about a source that does not exist

        def documents() -> Iterator[TokenDocument]:
            for document in read_documents(self.sources):
                ids = [*tokenizer.encode(document.text), tokenizer.eos_token_id]
                yield TokenDocument(np.asarray(ids, dtype=np.int64), len(document.text.encode()))

        return OpenSet(self.name, self.title, ", ".join(self.sources), documents)
