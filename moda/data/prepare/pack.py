"""Parts to shards: the documents of a source in order, cut at document ends into files of the chosen size."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from moda.files import write_json, writing

from .tasks import read_state, state_file

_BLOCK = 1 << 24


def plan_shards(parts: Path, ranks: list[int], split: str, shard_tokens: int) -> Iterator[dict[str, Any]]:
    """Shards of one source and split, as ``{"documents", "tokens", "stretches": [[rank, first token, last token], ...]}``.

    A shard holds as many whole documents as fit; a document longer than a shard is one by itself.
    """
    stretches: list[list[int]] = []
    documents = tokens = 0
    for rank in ranks:
        path = parts / f"{rank:05d}.{split}.ends"
        if not path.stat().st_size:
            continue
        ends = np.memmap(path, dtype=np.uint64, mode="r")
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

    def _blocks(self, plan: dict[str, Any]) -> Iterator[bytes]:
        for part, start, end in plan["stretches"]:
            source = Path(self.state) / "parts" / f"{part:05d}.{plan['split']}.tokens"
            left = (end - start) * self.width
            with source.open("rb") as f:
                f.seek(start * self.width)
                while left:
                    block = f.read(min(_BLOCK, left))
                    if not block:
                        raise EOFError(f"{source} is shorter than it was")
                    left -= len(block)
                    yield block

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        plan = read_state(self.state, "pack", rank)
        digest, size = hashlib.sha256(), 0
        with writing(Path(self.root) / plan["file"], "wb") as out:
            for block in self._blocks(plan):
                out.write(block)
                digest.update(block)
                size += len(block)
        entry = {k: plan[k] for k in ("file", "source", "split", "documents", "tokens")}
        entry.update(bytes=size, sha256=digest.hexdigest())
        write_json(state_file(self.state, "packed", rank), entry)
