"""The options of a preparation, checked when they are read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from moda.config.load import read_config
from moda.config.schema import TokenizerSection
from moda.data.formats import AUTO, FORMATS
from moda.errors import UserError, nearest
from moda.ranges import Range, Tokens
from moda.typed import Section, from_dict


class Policy(str, Enum):
    error = "error"
    skip = "skip"


class Dedup(str, Enum):
    none = "none"
    exact = "exact"
    minhash = "minhash"


class ExecutorKind(str, Enum):
    local = "local"
    ray = "ray"
    slurm = "slurm"


Small = Annotated[int, Range(1, 10_000)]


@dataclass
class SourceOptions(Section):
    """``sources.NAME``. A plain string or list is its ``path``.

    :param path: files, folders and globs; or the name or folder of a Hugging Face dataset.
    :param format: the name of a format (``moda.data.formats``), or ``auto``: that of each file. ``lines``: a document per
        line. ``code``: the files of a folder that are program text. ``huggingface``: for ``datasets.load_dataset``.
    :param field: the text field of a record.
    :param config: configuration of a Hugging Face dataset.
    :param split: its split.
    :param streaming: read it without downloading it first.
    :param shards: tasks that share it.
    """

    key: ClassVar[str] = "sources"

    path: str | list[str]
    format: str = AUTO
    field: str = "text"
    config: str | None = None
    split: str | None = None
    streaming: bool = False
    shards: Annotated[int, Range(1, 2**20, unit="tasks")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [AUTO, *FORMATS]
        if self.format not in known:
            raise UserError("sources.format", f"one of {', '.join(known)}", self.format, nearest(self.format, known))
        if isinstance(self.path, str):
            self.path = [self.path]
        if not self.path:
            raise UserError("sources.path", "at least one file, folder or glob", self.path)
        given = [n for n in ("config", "split", "streaming", "shards") if getattr(self, n)]
        if self.in_files and given:
            datasets = " or ".join(f.name for f in FORMATS.values() if not f.in_files)
            raise UserError(f"sources.{given[0]}", f"to be used with format: {datasets}", self.format)
        if not self.in_files:
            if len(self.path) != 1:
                raise UserError("sources.path", "one dataset", self.path)
            self.split = self.split or "train"

    @property
    def in_files(self) -> bool:
        """Whether the source is made of files, rather than a dataset."""
        return self.format == AUTO or FORMATS[self.format].in_files


@dataclass
class MinHashOptions(Section):
    """``minhash``: a pair of documents whose word n-grams overlap by s is found with probability 1-(1-s^hashes)^buckets.

    :param n_grams: words in an n-gram.
    :param buckets: groups of hashes, each of which can find a pair.
    :param hashes_per_bucket: hashes in a group, all of which must be equal.
    """

    key: ClassVar[str] = "minhash"

    n_grams: Small = 5
    buckets: Small = 14
    hashes_per_bucket: Small = 8


@dataclass
class PrepareOptions(Section):
    """A preparation: text in, token files and a manifest out.

    :param output: the folder to make. It appears when everything is there; until then there is ``OUTPUT.partial``.
    :param sources: what to read, by name. Token files are named after it.
    :param tokenizer: as ``data.tokenizer`` of a run.
    :param validation_fraction: share of the documents held out, by a hash of their text.
    :param shard_tokens: tokens in a shard, at most (a longer document is a shard by itself).
    :param task_bytes: input that a task reads; null: a 256th of all input, from 2 MiB to 256 MiB.
    :param minhash: how near is nearly equal.
    :param dedup: ``exact`` (equal text) or ``minhash`` (nearly equal text), over all sources.
    :param bad_input: what invalid UTF-8 or JSON, a missing field or a broken file leads to.
    :param empty: what a document without text leads to.
    :param executor: where tasks run. Like ``workers`` it changes nothing in the result.
    :param workers: tasks at a time; null for one per core (16 on Slurm).
    :param ray_address: a Ray cluster; null for one of this machine.
    :param slurm: settings of datatrove's SlurmPipelineExecutor; ``time`` and ``partition`` are needed.
    """

    output: str
    sources: dict[str, SourceOptions | str | list[str]]
    tokenizer: TokenizerSection | str = "dolma2"
    validation_fraction: Annotated[float, Range(0, 1, below=True)] = 0.005
    shard_tokens: Tokens = 1 << 27
    task_bytes: Annotated[int, Range(1, unit="bytes")] | None = None
    dedup: Dedup = Dedup.none
    minhash: MinHashOptions = field(default_factory=MinHashOptions)
    bad_input: Policy = Policy.error
    empty: Policy = Policy.skip
    executor: ExecutorKind = ExecutorKind.local
    workers: Annotated[int, Range(1, 2**16, unit="processes")] | None = None
    ray_address: str | None = None
    slurm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("sources", "at least one source (sources.NAME=PATH)")
        for name, given in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise UserError("sources", "names of letters, digits, dots, dashes and underscores", name)
            self.sources[name] = given if isinstance(given, SourceOptions) else SourceOptions(given)
        if isinstance(self.tokenizer, str):
            self.tokenizer = TokenizerSection(self.tokenizer)
        missing = {"time", "partition"} - set(self.slurm or {})
        if self.executor == ExecutorKind.slurm and missing:
            raise UserError("slurm", f"a value for {' and '.join(sorted(missing))}", self.slurm)

    @property
    def root(self) -> Path:
        return Path(self.output).expanduser()

    def source(self, name: str) -> SourceOptions:
        source = self.sources[name]
        assert isinstance(source, SourceOptions)
        return source


def load_options(path: str | None, overrides: Sequence[str]) -> PrepareOptions:
    """Options from a YAML file, ``key=value`` pairs, or both.

    :raises UserError: naming the key that is wrong.
    """
    return from_dict(PrepareOptions, read_config(path, overrides))
