"""Documents of flat token files, as OLMo-core reads them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moda.data.text import expand
from moda.data.token_files import looks_like, token_dtype
from moda.errors import UserError

from ..model import ModelInfo
from .base import DocumentSet, MissingData, OpenSet, TokenDocument


def open_token_files(entry: DocumentSet, paths: Sequence[Path], model: ModelInfo) -> OpenSet:
    """The documents of token files (uint16 or uint32) made with the model's tokenizer.

    :raises UserError: for files that are missing or, when they are read, hold ids that the tokenizer does not have.
    """
    tokenizer = model.tokenizer_info
    if tokenizer is None:
        raise UserError(entry.name, "a checkpoint that names its tokenizer", model.path, "give one with --tokenizer")
    dtype = token_dtype(tokenizer.config.vocab_size)
    for path in paths:
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % dtype.itemsize:
            raise UserError(entry.name, f"a token file {path} of whole {dtype} ids", f"{size} bytes")
        with path.open("rb") as f:
            wrong = looks_like(f.read(1 << 16), dtype)
        if wrong is not None:
            raise UserError(entry.name, f"flat {dtype} ids in {path}", wrong)
    try:
        text = model.tokenizer  # only for counting bytes
    except UserError:
        text = None

    def documents() -> Iterator[TokenDocument]:
        for path in paths:
            tokens = np.memmap(path, dtype=dtype, mode="r")
            ends = np.flatnonzero(tokens == tokenizer.config.eos_token_id) + 1
            # Each document has the end token that closes it; a last one without it counts too.
            for begin, end in itertools.pairwise([0, *ends.tolist(), len(tokens)]):
                if begin == end:
                    continue
                ids = np.asarray(tokens[begin:end], dtype=np.int64)
                if ids.max() >= tokenizer.config.vocab_size:
                    expected = f"ids below the {tokenizer.config.vocab_size} of {tokenizer.name} in {path}"
                    raise UserError(entry.name, expected, int(ids.max()))
                yield TokenDocument(ids, None if text is None else len(text.decode(ids.tolist()).encode()))

    return OpenSet(entry.name, entry.title, ", ".join(map(str, paths)), documents, tuple(paths))


@dataclass(frozen=True)
class TokenFiles(DocumentSet):
    """``--token-files NAME=GLOB``: token files of one's own."""

    patterns: tuple[str, ...]

    def open(self, model: ModelInfo, base_dir: str | None = None) -> OpenSet:
        paths = [Path(path) for pattern in self.patterns for path in expand(pattern)]
        if not paths:
            raise MissingData(self.name, "token files that exist", ", ".join(self.patterns))
        return open_token_files(self, paths, model)
