"""Documents to token files: datatrove's tokenizer step, with a train/validation split and bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.tokens import DocumentTokenizer

from moda.errors import UserError

from .tasks import write_json

if TYPE_CHECKING:
    import tokenizers

__all__ = ["SPLITS", "PartTokenizer", "cut_text", "load", "split_of"]

SPLITS = ("train", "validation")
_BATCH_CHARS = 1 << 20  # characters given to the tokenizer at a time
_LONGEST = 1 << 20  # characters of a document that are tokenized as one; longer documents are cut
# Where a long text may be cut: tokenizers that split words before merging (all byte-level BPE ones) never join tokens across
# a line end between two such characters, nor across a space between two letters, so the tokens are those of the whole text.
_LINE_END = re.compile(r"[A-Za-z0-9.,;:)](\n)(?=[A-Za-z0-9])")
_SPACE = re.compile(r"[A-Za-z](?= [A-Za-z])")


def split_of(text: bytes, validation_fraction: float) -> str:
    """``train`` or ``validation``, by the document's contents alone: equal documents are on the same side, everywhere."""
    if validation_fraction <= 0:
        return "train"
    share = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"


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


@lru_cache(maxsize=2)
def load(path: str) -> tokenizers.Tokenizer:
    """The tokenizer, once a process. What looks like a special token in a text is text: only we end documents."""
    import tokenizers

    loaded = (
        tokenizers.Tokenizer.from_file(path) if os.path.isfile(path) else tokenizers.Tokenizer.from_pretrained(path)
    )
    loaded.encode_special_tokens = True
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


class _Part:
    """A part's token file and the ends of its documents (uint64, in tokens), written aside."""

    def __init__(self, folder: Path, rank: int, split: str, dtype: np.dtype) -> None:
        self.name, self.dtype = folder / f"{rank:05d}.{split}", dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = [self.name.with_name(f".{self.name.name}.{os.getpid()}.{kind}.partial") for kind in "te"]
        self._tokens, self._ends = (path.open("wb") for path in self._scratch)
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
            self._flush()

    def _flush(self) -> None:
        self._ends.write(self._pending.tobytes())
        self._pending = array("Q")

    def finish(self) -> dict[str, int]:
        """Put the files in place; what they hold."""
        self._flush()
        for file, scratch, kind in zip((self._tokens, self._ends), self._scratch, ("tokens", "ends")):
            file.close()  # not synced: the sizes are checked when the part is used
            scratch.replace(self.name.with_name(f"{self.name.name}.{kind}"))
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}

    def discard(self) -> None:
        for file, scratch in zip((self._tokens, self._ends), self._scratch):
            with contextlib.suppress(OSError):  # closing flushes: on a full disk it repeats the error that led here
                file.close()
            scratch.unlink(missing_ok=True)


class PartTokenizer(DocumentTokenizer):
    """datatrove's tokenizer step, writing one part (train and validation) a task.

    Each document ends with eos. Unlike its base it holds two batches of a bounded number of characters at a time, whatever a
    document's length, splits by :func:`split_of`, checks ids against the vocabulary, and writes aside.

    :param state: the state folder.
    :param tokenizer_path: a ``tokenizer.json``, or a hub name.
    :param vocab_size: ids must be below it.
    :param eos_token_id: ends every document.
    """

    name = "parts of a preparation"

    def __init__(
        self,
        state: str,
        tokenizer_path: str,
        *,
        vocab_size: int,
        eos_token_id: int,
        dtype: str,
        validation_fraction: float,
    ) -> None:
        super().__init__(str(Path(state) / "parts"), tokenizer_path, save_final_metadata=False, shuffle_documents=False)
        self.state, self.vocab_size, self.eos_token_id = state, vocab_size, eos_token_id
        self.dtype, self.validation_fraction = np.dtype(dtype), validation_fraction

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:  # type: ignore[override]
        return load(self.tokenizer_name_or_path)

    def _stretches(self, data: Any) -> Iterator[tuple[str, int, str]]:
        """(text, size of the document in bytes or -1 if it goes on, split)."""
        document: Document
        for document in data:
            raw = document.text.encode("utf-8", errors="surrogatepass")
            split = split_of(raw, self.validation_fraction)
            size = len(raw)
            del raw
            if len(document.text) <= _LONGEST:
                yield document.text, size, split
                continue
            last = None
            for stretch in cut_text(document.text):
                if last is not None:
                    yield last, -1, split
                last = stretch
            assert last is not None
            yield last, size, split

    def _batches(self, data: Any) -> Iterator[list[tuple[str, int, str]]]:
        batch: list[tuple[str, int, str]] = []
        chars = 0
        for item in self._stretches(data):
            batch.append(item)
            chars += len(item[0])
            if chars >= _BATCH_CHARS or len(batch) >= 1024:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _encode(self, batch: list[tuple[str, int, str]]) -> Any:
        return self.tokenizer.encode_batch_fast([text for text, _, _ in batch], add_special_tokens=False)

    def _write(self, batch: list[tuple[str, int, str]], encoded: Any, parts: dict[str, _Part]) -> None:
        for (_, size, split), e in zip(batch, encoded):
            ids = np.asarray(e.ids if size < 0 else [*e.ids, self.eos_token_id], dtype=np.int64)
            if len(ids) and ids.max() >= self.vocab_size:
                raise UserError("tokenizer.vocab_size", f"more than the largest token id {ids.max()}", self.vocab_size)
            parts[split].write(ids)
            if size >= 0:
                parts[split].end_document(size)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        parts = {split: _Part(self.output_folder_path, rank, split, self.dtype) for split in SPLITS}
        try:
            # The C library's memory for a process's first thread makes the tokenizer half again as slow as in any other.
            with ThreadPoolExecutor(1) as encoder:
                previous: list[tuple[str, int, str]] = []
                running = encoder.submit(self._encode, previous)
                for batch in itertools.chain(self._batches(data), [[]]):
                    with self.track_time(unit="batch"):
                        encoded = running.result()
                        running = encoder.submit(self._encode, batch)
                        self._write(previous, encoded, parts)
                        previous = batch
            held = {split: part.finish() for split, part in parts.items()}
        finally:
            for part in parts.values():
                part.discard()
        self.stat_update("tokens", value=sum(h["tokens"] for h in held.values()))
        write_json(self.output_folder_path / f"{rank:05d}.json", held)

    @property
    def output_folder_path(self) -> Path:
        return Path(self.state) / "parts"
