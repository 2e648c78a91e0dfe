"""The options of a preparation, checked when they are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moda.config.load import read_yaml
from moda.config.schema import TokenizerSection
from moda.data.formats import AUTO, FORMATS
from moda.errors import UserError, nearest
from moda.typed import from_dict


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


def _at_least_one(key: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(key, "an integer >= 1", value)


@dataclass
class SourceOptions:
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

    path: str | list[str]
    format: str = AUTO
    field: str = "text"
    config: str | None = None
    split: str | None = None
    streaming: bool = False
    shards: int | None = None

    def __post_init__(self) -> None:
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
        _at_least_one("sources.shards", self.shards)

    @property
    def in_files(self) -> bool:
        """Whether the source is made of files, rather than a dataset."""
        return self.format == AUTO or FORMATS[self.format].in_files


@dataclass
class MinHashOptions:
    """``minhash``: a pair of documents whose word n-grams overlap by s is found with probability 1-(1-s^hashes)^buckets."""

    n_grams: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8

    def __post_init__(self) -> None:
        for name in ("n_grams", "buckets", "hashes_per_bucket"):
            _at_least_one(f"minhash.{name}", getattr(self, name))


@dataclass
class PrepareOptions:
    """A preparation: text in, token files and a manifest out.

    :param output: the folder to make. It appears when everything is there; until then there is ``OUTPUT.partial``.
    :param sources: what to read, by name. Token files are named after it.
    :param tokenizer: as ``data.tokenizer`` of a run.
    :param validation_fraction: share of the documents held out, by a hash of their text.
    :param shard_tokens: tokens in a shard, at most (a longer document is a shard by itself).
    :param task_bytes: input that a task reads; null: a 256th of all input, from 2 MiB to 256 MiB.
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
    validation_fraction: float = 0.005
    shard_tokens: int = 1 << 27
    task_bytes: int | None = None
    dedup: Dedup = Dedup.none
    minhash: MinHashOptions = field(default_factory=MinHashOptions)
    bad_input: Policy = Policy.error
    empty: Policy = Policy.skip
    executor: ExecutorKind = ExecutorKind.local
    workers: int | None = None
    ray_address: str | None = None
    slurm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources", "at least one source (sources.NAME=PATH)")
        for name, given in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise UserError("sources", "names of letters, digits, dots, dashes and underscores", name)
            self.sources[name] = given if isinstance(given, SourceOptions) else SourceOptions(given)
        if isinstance(self.tokenizer, str):
            self.tokenizer = TokenizerSection(self.tokenizer)
        if not 0 <= self.validation_fraction < 1:
            raise UserError("validation_fraction", "a number from 0 to below 1", self.validation_fraction)
        for key in ("shard_tokens", "task_bytes", "workers"):
            _at_least_one(key, getattr(self, key))
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
    if path is not None:
        data: Mapping[str, Any] = read_yaml(path, overrides)
    else:
        for pair in overrides:
            if "=" not in pair:
                raise UserError("argument", "key=value, or one YAML file first", pair)
        try:
            plain = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)
        except (OmegaConfBaseException, YAMLError) as e:
            raise UserError("argument", "key=value with a YAML value", " ".join(str(e).split())) from None
        data = cast(Mapping[str, Any], plain)
    return from_dict(PrepareOptions, data)
