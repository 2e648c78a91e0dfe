"""De-duplication over all sources, by datatrove's exact and MinHash steps.

Both read the documents of every task in the same order as the tokenizing stage does, and give that stage a filter.
Equal contents (exact), or near-equal word 5-grams (MinHash), lose all but one document.
"""

# No `from __future__ import annotations`: datatrove reads the return annotation of `_content` as a type.
from collections.abc import Callable
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from .steps import TaskReader

#: A stage's name, its pipeline and its number of tasks.
Stage = tuple[str, list[PipelineStep], int]


# SHA-1, because datatrove's xxhash functions fail with xxhash 4, which no longer takes strings.
_HASH = HashConfig(precision=64, hash_fc="sha1")


def _content(document: Document) -> bytes:
    return document.text.encode("utf-8")


class _Whitespace(WordTokenizer):
    """Words between white space: no language package is needed, and none changes the result with its version."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def exact(state: str, tasks: int) -> tuple[list[Stage], Callable[[], PipelineStep]]:
    """The stages that find equal documents, and the filter that drops them."""
    config = ExactDedupConfig(content_getter=_content, hash_config=_HASH)
    signatures, duplicates = f"{state}/exact/signatures", f"{state}/exact/duplicates"
    stages: list[Stage] = [
        ("hash", [TaskReader(state, "hash"), ExactDedupSignature(signatures, config)], tasks),
        ("find", [ExactFindDedups(signatures, duplicates, config, lines_to_buffer=4096)], 1),
    ]
    return stages, lambda: ExactDedupFilter(duplicates, config)


def minhash(
    state: str, tasks: int, *, n_grams: int, buckets: int, hashes_per_bucket: int
) -> tuple[list[Stage], Callable[[], PipelineStep]]:
    """The stages that find near-duplicates, and the filter that drops them."""
    config = MinhashConfig(n_grams=n_grams, num_buckets=buckets, hashes_per_bucket=hashes_per_bucket, hash_config=_HASH)
    folder = f"{state}/minhash"
    words: Any = _Whitespace("en")
    stages: list[Stage] = [
        ("hash", [TaskReader(state, "hash"), MinhashDedupSignature(f"{folder}/signatures", config, words)], tasks),
        ("match", [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/matches", config=config)], buckets),
        ("cluster", [MinhashDedupCluster(f"{folder}/matches", f"{folder}/remove", config=config)], 1),
    ]
    return stages, lambda: MinhashDedupFilter(f"{folder}/remove")
