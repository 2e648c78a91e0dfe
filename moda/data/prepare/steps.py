"""datatrove's steps of a preparation: documents read, tokenized into parts, and parts packed into shards."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.tokens import DocumentTokenizer

from moda.data.formats import FORMATS
from moda.data.text import is_held_out
from moda.data.tokenizer import encode_batch, load_encoder
from moda.errors import UserError
from moda.files import write_json, writing

from .tasks import read_state, read_task, state_file

if TYPE_CHECKING:
    import tokenizers

SPLITS = ("train", "validation")
_PROGRESS_SECONDS = 0.5
_BLOCK = 1 << 24
_BATCH_CHARS = 1 << 20  # characters given to the tokenizer at a time
_LONGEST = 1 << 20  # characters of a document that are tokenized as one; longer documents are cut
# Where a long text may be cut: tokenizers that split words before merging (all byte-level BPE ones) never join tokens across
# a line end between two such characters, nor across a space between two letters, so the tokens are those of the whole text.
_LINE_END = re.compile(r"[A-Za-z0-9.,;:)](\n)(?=[A-Za-z0-9])")
_SPACE = re.compile(r"[A-Za-z](?= [A-Za-z])")

#: (text, size of the document in bytes or -1 if it continues, split)
Stretch = tuple[str, int, str]


class TaskReader(BaseReader):
    """The documents of task ``rank``, whatever worker runs it.

    datatrove's own readers log what they cannot read and continue; here every such record is an error that names the file
    and the place, or is counted and reported, as configured.

    :param state: the state folder of the preparation.
    :param stage: the stage that reads, for its progress; what was counted is kept for the stage ``tokenize`` only.
    """

    name = "tasks of a preparation"

    def __init__(self, state: str, stage: str) -> None:
        super().__init__()
        self.state, self.stage = state, stage

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # type: ignore[override]
        task = read_task(self.state, rank)
        records, note = task.records, Path(self.state) / "progress" / self.stage / f"{rank:05d}"
        note.parent.mkdir(parents=True, exist_ok=True)
        read, noted = 0, 0.0  # bytes of the pieces before this one; the time of the last note
        for piece in task.pieces:
            records.position = 0
            for text, place in FORMATS[piece.format].documents(piece, records):
                records.counts["documents"] += 1
                if time.monotonic() - noted > _PROGRESS_SECONDS:
                    noted = time.monotonic()
                    note.write_text(json.dumps([read + records.position, records.counts["documents"]]))
                yield Document(text=text, id=place)
            read += piece.size
        note.write_text(json.dumps([read, records.counts["documents"]]))
        if self.stage == "tokenize":
            write_json(state_file(self.state, "reads", rank), records.counts)


def cut_text(text: str, longest: int = _LONGEST) -> Iterator[str]:
    """A text in stretches of at most ``longest`` characters, cut where no token is."""
    start = 0
    while len(text) - start > longest:
        window = text[start + longest // 2 : start + longest]
        cut = longest
        for pattern in (_LINE_END, _SPACE):
            if ends := [m.end() for m in pattern.finditer(window)]:
                cut = longest // 2 + ends[-1]
                break
        yield text[start : start + cut]
        start += cut
    yield text[start:]


class _Part:
    """A part that is being written: its tokens, and the ends of its documents (uint64, in tokens)."""

    def __init__(self, tokens: IO[bytes], ends: IO[bytes], dtype: np.dtype) -> None:
        self._tokens, self._ends, self.dtype = tokens, ends, dtype
        self.summary = {"documents": 0, "tokens": 0, "bytes": 0}

    def write(self, ids: np.ndarray) -> None:
        self._tokens.write(ids.astype(self.dtype).tobytes())
        self.summary["tokens"] += len(ids)

    def end_document(self, size: int) -> None:
        self.summary["documents"] += 1
        self.summary["bytes"] += size
        self._ends.write(self.summary["tokens"].to_bytes(8, sys.byteorder))


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

    def _batches(self, data: Any) -> Iterator[list[Stretch]]:
        batch: list[Stretch] = []
        chars = 0
        for document in data:
            split = "validation" if is_held_out(document.text, self.validation_fraction) else "train"
            texts = list(cut_text(document.text))
            for number, text in enumerate(texts, 1):
                batch.append((text, len(document.text.encode("utf-8")) if number == len(texts) else -1, split))
                chars += len(text)
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
        # The C library's memory for a process's first thread makes the tokenizer half again as slow as in any other.
        with contextlib.ExitStack() as files, ThreadPoolExecutor(1) as encoder:
            parts: dict[str, _Part] = {}
            for split in SPLITS:
                paths = [Path(self.state) / "parts" / f"{rank:05d}.{split}.{kind}" for kind in ("tokens", "ends")]
                tokens, ends = (files.enter_context(writing(path, "wb")) for path in paths)
                parts[split] = _Part(tokens, ends, self.dtype)
            previous: list[Stretch] = []
            running = encoder.submit(self._encode, previous)
            for batch in itertools.chain(self._batches(data), [[]]):
                with self.track_time(unit="batch"):
                    encoded = running.result()
                    running = encoder.submit(self._encode, batch)
                    self._write(previous, encoded, parts)
                    previous = batch
        self.stat_update("tokens", value=sum(p.summary["tokens"] for p in parts.values()))
        write_json(state_file(self.state, "parts", rank), {split: p.summary for split, p in parts.items()})


def plan_shards(parts: Path, ranks: list[int], split: str, shard_tokens: int) -> Iterator[dict[str, Any]]:
    """Shards of one source and split, as ``{"documents", "tokens", "stretches": [[rank, first token, last token], ...]}``.

    A shard holds as many whole documents as fit; a document longer than a shard is one by itself.
    """
    stretches: list[list[int]] = []
    documents = tokens = 0
    for rank in ranks:
        ends = np.fromfile(parts / f"{rank:05d}.{split}.ends", dtype=np.uint64)
        first, start = 0, 0  # the part's next document and its first token
        while first < len(ends):
            # Documents first .. last-1 still fit into the shard that is being filled.
            last = int(np.searchsorted(ends, np.uint64(start + max(0, shard_tokens - tokens)), side="right"))
            if last == first and tokens == 0:
                last = first + 1
            if last > first:
                end = int(ends[last - 1])
                stretches.append([rank, start, end])
                documents, tokens = documents + last - first, tokens + end - start
                first, start = last, end
            if first < len(ends):
                yield {"documents": documents, "tokens": tokens, "stretches": stretches}
                stretches, documents, tokens = [], 0, 0
    if documents:
        yield {"documents": documents, "tokens": tokens, "stretches": stretches}


class ShardWriter(PipelineStep):
    """Writes shard ``rank`` as planned in ``pack/`` and notes its size and SHA-256.

    :param root: the folder that becomes the output.
    :param state: the state folder.
    """

    type = "shards"
    name = "shards of a preparation"

    def __init__(self, root: str, state: str, dtype: str) -> None:
        super().__init__()
        self.root, self.state, self.width = root, state, np.dtype(dtype).itemsize

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        plan = read_state(self.state, "pack", rank)
        digest, size = hashlib.sha256(), 0
        with writing(Path(self.root) / plan["file"], "wb") as out:
            for part, start, end in plan["stretches"]:
                source = Path(self.state) / "parts" / f"{part:05d}.{plan['split']}.tokens"
                left = (end - start) * self.width
                with source.open("rb") as f:
                    f.seek(start * self.width)
                    while left:
                        if not (block := f.read(min(_BLOCK, left))):
                            raise EOFError(f"{source} is shorter than it was")
                        out.write(block)
                        digest.update(block)
                        left, size = left - len(block), size + len(block)
        entry = {k: plan[k] for k in ("file", "source", "split", "documents", "tokens")}
        write_json(state_file(self.state, "packed", rank), {**entry, "bytes": size, "sha256": digest.hexdigest()})
