"""De-duplication over all sources, by datatrove's exact and MinHash steps.

Both read the documents of every task in the same order as the tokenizing stage does, and give that stage a filter.
Equal contents (exact), or near-equal word 5-grams (MinHash), lose all but one document.
"""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from .options import PrepareOptions

#: A stage's name, its pipeline and its number of tasks.
Stage = tuple[str, list[PipelineStep], int]

# SHA-1, because datatrove's xxhash functions fail with xxhash 4, which no longer takes strings.
_HASH = HashConfig(precision=64, hash_fc="sha1")


def _content(document: Document) -> bytes:  # datatrove reads this annotation as a type: no future import here
    return document.text.encode("utf-8")


class _Whitespace(WordTokenizer):
    """Words between white space: no language package is needed, and none changes the result with its version."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def stages(options: "PrepareOptions", state: str, tasks: int) -> tuple[list[Stage], list[PipelineStep]]:
    """The stages that find the duplicates, and the filter that drops them; neither where none are asked for."""
    if options.dedup.value == "none":
        return [], []
    signatures, matches, remove = (
        f"{state}/{options.dedup.value}/{name}" for name in ("signatures", "matches", "remove")
    )
    reader = TaskReader(state, "hash")
    if options.dedup.value == "exact":
        exact = ExactDedupConfig(content_getter=_content, hash_config=_HASH)
        find = ExactFindDedups(signatures, remove, exact, lines_to_buffer=4096)
        hashing: PipelineStep = ExactDedupSignature(signatures, exact)
        return [("hash", [reader, hashing], tasks), ("find", [find], 1)], [ExactDedupFilter(remove, exact)]
    given, words = options.minhash, _Whitespace("en")
    config = MinhashConfig(
        n_grams=given.n_grams, num_buckets=given.buckets, hashes_per_bucket=given.hashes_per_bucket, hash_config=_HASH
    )
    return [
        ("hash", [reader, MinhashDedupSignature(signatures, config, words)], tasks),
        ("match", [MinhashDedupBuckets(signatures, matches, config=config)], given.buckets),
        ("cluster", [MinhashDedupCluster(matches, remove, config=config)], 1),
    ], [MinhashDedupFilter(remove)]
