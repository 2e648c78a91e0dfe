"""Documents of local text, tokenized as training data is: no special tokens inside, the end token at the end."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moda.data.text import PYTHON_STDLIB, find_files, read_documents

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

        own = [source for source in self.sources if source != PYTHON_STDLIB]
        files = tuple(Path(f.path) for source in own for f in find_files(self.name, source))

        def documents() -> Iterator[TokenDocument]:
            for document in read_documents(self.sources):
                ids = [*tokenizer.encode(document.text), tokenizer.eos_token_id]
                yield TokenDocument(np.asarray(ids, dtype=np.int64), len(document.text.encode()))

        return OpenSet(self.name, self.title, ", ".join(self.sources), documents, files)
