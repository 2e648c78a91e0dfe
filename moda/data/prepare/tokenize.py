"""Documents to token files: datatrove's tokenizer step, with a train/validation split and bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import re
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.tokens import DocumentTokenizer

from moda.data.text import is_held_out
from moda.data.tokenizer import encode_batch, load_encoder
from moda.errors import UserError
from moda.files import write_json, writing

from .tasks import state_file

if TYPE_CHECKING:
    import tokenizers

SPLITS = ("train", "validation")
_BATCH_CHARS = 1 << 20  # characters given to the tokenizer at a time
_LONGEST = 1 << 20  # characters of a document that are tokenized as one; longer documents are cut
# Where a long text may be cut: tokenizers that split words before merging (all byte-level BPE ones) never join tokens across
# a line end between two such characters, nor across a space between two letters, so the tokens are those of the whole text.
_LINE_END = re.compile(r"[A-Za-z0-9.,;:)](\n)(?=[A-Za-z0-9])")
_SPACE = re.compile(r"[A-Za-z](?= [A-Za-z])")

#: (text, size of the document in bytes or -1 if it continues, split)
Stretch = tuple[str, int, str]


def cut_text(text: str, longest: int = _LONGEST) -> Iterator[str]:
    """A text in stretches of at most ``longest`` characters, cut where no token is."""
    start = 0
    while len(text) - start > longest:
        window = text[start + longest // 2 : start + longest]
        cut = longest
        for pattern in (_LINE_END, _SPACE):
            ends = [m.end() for m in pattern.finditer(window)]
            if ends:
                cut = longest // 2 + ends[-1]
                break
        yield text[start : start + cut]
        start += cut
    yield text[start:]


class _Part:
    """A part that is being written: its tokens, and the ends of its documents (uint64, in tokens)."""

    def __init__(self, tokens: IO[bytes], ends: IO[bytes], dtype: np.dtype) -> None:
        self._tokens, self._ends, self.dtype = tokens, ends, dtype
        self.documents = self.tokens = self.bytes = 0
        self._pending = array("Q")

    def write(self, ids: np.ndarray) -> None:
        self._tokens.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)

    def end_document(self, size: int) -> None:
        self.documents += 1
        self.bytes += size
        self._pending.append(self.tokens)
        if len(self._pending) >= 4096:
            self.flush()

    def flush(self) -> None:
        self._ends.write(self._pending.tobytes())
        self._pending = array("Q")

    def summary(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}


class PartTokenizer(DocumentTokenizer):
    """datatrove's tokenizer step, writing one part (train and validation) per task.

    Each document ends with eos. Unlike its base it keeps two batches of a bounded number of characters at a time, whatever a
    document's length, splits by :func:`moda.data.text.is_held_out`, checks ids against the vocabulary, and writes atomically.

    :param state: the state folder.
    :param tokenizer: a ``tokenizer.json``, or a hub name.
    :param vocab_size: ids must be below it.
    :param eos_token_id: ends every document.
    """

    name = "parts of a preparation"

    def __init__(
        self, state: str, tokenizer: str, *, vocab_size: int, eos_token_id: int, dtype: str, validation_fraction: float
    ) -> None:
        super().__init__(str(Path(state) / "parts"), tokenizer, save_final_metadata=False, shuffle_documents=False)
        self.state, self.vocab_size, self.eos_token_id = state, vocab_size, eos_token_id
        self.dtype, self.validation_fraction = np.dtype(dtype), validation_fraction

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:  # type: ignore[override]
        return load_encoder(self.tokenizer_name_or_path)

    def _stretches(self, data: Any) -> Iterator[Stretch]:
        for document in data:
            split = "validation" if is_held_out(document.text, self.validation_fraction) else "train"
            *first, last = cut_text(document.text)
            yield from ((stretch, -1, split) for stretch in first)
            yield last, len(document.text.encode("utf-8")), split

    def _batches(self, data: Any) -> Iterator[list[Stretch]]:
        batch: list[Stretch] = []
        chars = 0
        for item in self._stretches(data):
            batch.append(item)
            chars += len(item[0])
            if chars >= _BATCH_CHARS or len(batch) >= 1024:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _encode(self, batch: list[Stretch]) -> list[list[int]]:
        return encode_batch(self.tokenizer, [text for text, _, _ in batch])

    def _write(self, batch: list[Stretch], encoded: list[list[int]], parts: dict[str, _Part]) -> None:
        for (_, size, split), tokens in zip(batch, encoded):
            ids = np.asarray(tokens if size < 0 else [*tokens, self.eos_token_id], dtype=np.int64)
            if len(ids) and ids.max() >= self.vocab_size:
                raise UserError("tokenizer.vocab_size", f"more than the largest token id {ids.max()}", self.vocab_size)
            parts[split].write(ids)
            if size >= 0:
                parts[split].end_document(size)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        folder = Path(self.state) / "parts"
        with contextlib.ExitStack() as files:

            def part(split: str) -> _Part:
                paths = [folder / f"{rank:05d}.{split}.{kind}" for kind in ("tokens", "ends")]
                tokens, ends = (files.enter_context(writing(path, "wb")) for path in paths)
                return _Part(tokens, ends, self.dtype)

            parts = {split: part(split) for split in SPLITS}
            # The C library's memory for a process's first thread makes the tokenizer half again as slow as in any other.
            with ThreadPoolExecutor(1) as encoder:
                previous: list[Stretch] = []
                running = encoder.submit(self._encode, previous)
                for batch in itertools.chain(self._batches(data), [[]]):
                    with self.track_time(unit="batch"):
                        encoded = running.result()
                        running = encoder.submit(self._encode, batch)
                        self._write(previous, encoded, parts)
                        previous = batch
            for p in parts.values():
                p.flush()
        summary = {split: p.summary() for split, p in parts.items()}
        self.stat_update("tokens", value=sum(s["tokens"] for s in summary.values()))
        write_json(state_file(self.state, "parts", rank), summary)
