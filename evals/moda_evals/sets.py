"""Sets of documents for perplexity: the ten of the paper's Table 5, any token files, any local text."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from olmo_core.data import DataMix
from olmo_core.io import is_url, resource_path

from moda.data import Tokenizer
from moda.data.text import read_documents
from moda.data.token_files import token_dtype
from moda.errors import UserError, nearest

from .model import ScoredModel

__all__ = [
    "PAPER_SETS",
    "DocumentSet",
    "PaperSet",
    "TokenDocument",
    "expand_tokens",
    "paper_sets",
    "text_set",
    "token_set",
]

VALIDATION_MIX = DataMix.v3_small_ppl_validation


@dataclass(frozen=True)
class PaperSet:
    """A column of Table 5: our name, the paper's, and the name in OLMo-core's validation mix."""

    name: str
    title: str
    label: str


PAPER_SETS: tuple[PaperSet, ...] = (
    PaperSet("c4", "C4", "c4_en"),
    PaperSet("ice", "ICE", "ice"),
    PaperSet("m2d2_s2orc", "m2d2-s2orc", "m2d2_s2orc"),
    PaperSet("pile", "Pile", "pile"),
    PaperSet("wikitext", "Wiki-text", "wikitext_103"),
    PaperSet("books", "Books", "dolma_books"),
    PaperSet("cc", "CC", "dolma_common-crawl"),
    PaperSet("pes2o", "peS2o", "dolma_pes2o"),
    PaperSet("reddit", "Reddit", "dolma_reddit"),
    PaperSet("stack", "Stack", "dolma_stack"),
)


@dataclass(frozen=True)
class TokenDocument:
    """Ids of one document, its end token included, and the bytes of its text where they are known."""

    ids: np.ndarray
    n_bytes: int | None


@dataclass(frozen=True)
class DocumentSet:
    """A named set of documents; ``source`` says where they come from."""

    name: str
    title: str
    source: str
    documents: Callable[[], Iterator[TokenDocument]]


def _split(tokens: np.ndarray, eos: int) -> Iterator[np.ndarray]:
    """Documents of a flat array, each with the end token that closes it; a last one without it counts too."""
    ends = np.flatnonzero(tokens == eos) + 1
    begin = 0
    for end in [*ends.tolist(), len(tokens)]:
        if end > begin:
            yield tokens[begin:end]
        begin = end


def token_set(name: str, title: str, paths: Sequence[Path], tokenizer: Tokenizer, model: ScoredModel) -> DocumentSet:
    """Documents of flat token files (uint16 or uint32), as OLMo-core reads them.

    :raises UserError: for files that are missing or hold ids that the tokenizer does not have.
    """
    dtype = token_dtype(tokenizer.config.vocab_size)
    for path in paths:
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % dtype.itemsize:
            raise UserError(name, f"a token file {path} of whole {dtype} ids", f"{size} bytes")
    try:
        text = model.tokenizer  # only for counting bytes
    except UserError:
        text = None

    def documents() -> Iterator[TokenDocument]:
        for path in paths:
            tokens = np.memmap(path, dtype=dtype, mode="r")
            for ids in _split(tokens, tokenizer.config.eos_token_id):
                ids = np.asarray(ids, dtype=np.int64)
                if ids.max() >= tokenizer.config.vocab_size:
                    raise UserError(
                        name,
                        f"ids below the {tokenizer.config.vocab_size} of {tokenizer.name} in {path}",
                        int(ids.max()),
                    )
                yield TokenDocument(ids, None if text is None else len(text.decode(ids.tolist()).encode()))

    return DocumentSet(name, title, ", ".join(map(str, paths)), documents)


def text_set(name: str, sources: Sequence[str], model: ScoredModel) -> DocumentSet:
    """Documents of local text (files, folders, globs, .jsonl with a ``text`` field), ended by the tokenizer's end token."""
    tokenizer = model.tokenizer

    def documents() -> Iterator[TokenDocument]:
        for document in read_documents(sources):
            ids = [*tokenizer.prefix, *tokenizer.encode(document.text), tokenizer.eos_token_id]
            yield TokenDocument(np.asarray(ids, dtype=np.int64), len(document.text.encode()))

    return DocumentSet(name, name, ", ".join(sources), documents)


def _locate(base_dir: str, relative: str, entry: PaperSet) -> Path:
    how = f"get it: python scripts/prepare_data.py mirror {VALIDATION_MIX.value} FOLDER, then --base-dir FOLDER"
    if is_url(base_dir):
        try:
            return resource_path(base_dir.rstrip("/"), relative)
        except Exception as e:  # network clients raise many kinds
            reason = " ".join(str(e).split())[:120]
            raise UserError(
                entry.name, f"{base_dir.rstrip('/')}/{relative}", f"no such file to be had: {reason}", how
            ) from None
    path = Path(base_dir).expanduser() / relative
    if not path.is_file():
        raise UserError(entry.name, f"the token file {path}", "no such file", how)
    return path


def paper_sets(
    base_dir: str | None, names: Sequence[str] | None, model: ScoredModel, *, skip_missing: bool = False
) -> tuple[list[DocumentSet], dict[str, str]]:
    """The paper's sets, in its order, in the tokens of the model's tokenizer.

    :param base_dir: folder or URL under which ``eval-data/perplexity/v3_small_*`` lies.
    :param names: which of them; all ten if None.
    :param skip_missing: leave out sets whose file is absent.

    :returns: the sets, and why each one left out is missing.

    :raises UserError: for an unknown name or an absent file.
    """
    known: Mapping[str, PaperSet] = {s.name: s for s in PAPER_SETS}
    for name in names or ():
        if name not in known:
            raise UserError("--sets", "known sets", name, nearest(name, known))
    if base_dir is None:
        raise UserError(
            "--base-dir", f"the folder or URL under which the validation sets of {VALIDATION_MIX.value} lie",
            hint="for example https://olmo-data.org, or a local mirror; --text NAME=PATH takes text of your own",
        )  # fmt: skip
    tokenizer = model.tokenizer_info
    if tokenizer is None or tokenizer.hub is None:
        raise UserError(
            "--sets",
            "a model whose tokenizer the sets exist for (they are token files)",
            "none" if tokenizer is None else tokenizer.name,
            "--text NAME=PATH takes text",
        )
    try:
        paths, labels = VALIDATION_MIX.build("", tokenizer.hub)
    except (ValueError, FileNotFoundError) as e:
        raise UserError(
            "--sets", f"a tokenizer that {VALIDATION_MIX.value} exists for", tokenizer.hub, str(e)
        ) from None
    relative = {label.removesuffix("-validation"): str(path).lstrip("/") for path, label in zip(paths, labels)}
    found: list[DocumentSet] = []
    missing: dict[str, str] = {}
    for entry in PAPER_SETS:
        if names is not None and entry.name not in names:
            continue
        try:
            path = _locate(base_dir, relative[entry.label], entry)
        except UserError as e:
            if not skip_missing:
                raise
            missing[entry.name] = str(e)
            continue
        found.append(token_set(entry.name, entry.title, [path], tokenizer, model))
    return found, missing


def expand_tokens(name: str, patterns: Sequence[str]) -> list[Path]:
    """Token files of globs.

    :raises UserError: where nothing matches.
    """
    paths = [
        Path(p) for pattern in patterns for p in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    ]
    if not paths:
        raise UserError(name, "token files that exist", ", ".join(patterns))
    return paths
