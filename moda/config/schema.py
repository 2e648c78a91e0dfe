"""Every configuration key, its type, default and allowed values.

A YAML file holds only what differs from these defaults. Batch sizes are in sequences, durations in steps unless a name says
tokens. Sections check themselves when they are made; what concerns several sections is checked by :class:`RunConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from moda.errors import UserError
from moda.ranges import NotNegative, Positive, Range, Seed, Share, Steps, Tokens
from moda.typed import Section

from .choices import Auto, Checkpointing, DataParallel, Float8, Optimizer
from .data import DataConfig, MixtureSection, MixtureSource, TokenizerSection, Verify
from .model import ModelConfig
from .names import folder_name

__all__ = [
    "CheckpointConfig", "DataConfig", "EvalConfig", "LoggingConfig", "MixtureSection", "MixtureSource", "ModelConfig",
    "OptimConfig", "ParallelConfig", "RunConfig", "TokenizerSection", "TrainConfig", "Verify",
]  # fmt: skip

Beta = Annotated[float, Range(0, 1, below=True)]


@dataclass
class OptimConfig(Section):
    """``optim``: AdamW, linear warm-up, cosine to ``final_lr_ratio * lr`` at the end of ``max_steps`` or ``max_tokens``.

    :param name: ``adamw``, or ``skip_step_adamw``, which leaves out steps whose loss or gradient norm is an outlier.
    :param lr: the learning rate after the warm-up.
    :param betas: decay of the averages of the gradient and of its square.
    :param eps: added to the root of the second average.
    :param warmup_steps: over which the learning rate rises from 0.
    :param final_lr_ratio: the learning rate of the last step, as a share of ``lr``.
    :param weight_decay: on everything but the embeddings.
    :param max_grad_norm: clip gradients to this norm; null for none.
    :param z_loss: weight of the squared log-normaliser; null for none.
    """

    key: ClassVar[str] = "optim"

    name: Optimizer = Optimizer.adamw
    lr: Positive = 3e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    warmup_steps: Annotated[int, Range(0, unit="steps")] = 2000
    final_lr_ratio: Share = 0.1
    max_grad_norm: Positive | None = 1.0
    z_loss: Positive | None = 1e-5


@dataclass
class TrainConfig(Section):
    """``train``: batch, duration, where to.

    :param sequence_length: tokens in a sequence.
    :param global_batch_size: sequences in an optimizer step, over all ranks.
    :param microbatch_size: sequences that one rank runs at a time; ``auto`` for as many as fit its memory by the estimate.
    :param max_tokens: stop after this many tokens, however large the batches were; give this or ``max_steps``.
    :param max_steps: stop after this many steps.
    :param seed: of the initial weights and the order of the data; a run keeps it.
    :param save_folder: checkpoints, logs and metrics; ``runs/<name>`` if null. A run found there is resumed.
    :param load_path: a checkpoint to start from when the save folder has none.
    :param load_other_reads: whether ``load_path`` may have been trained with other slots (``model.depth.read``, ``slot_dtype``).
    :param compile: whether blocks are compiled; null for yes on a GPU and no on a CPU.
    :param cuda_graph: whether one GPU runs forward and backward of a microbatch as one CUDA graph; null for yes where they are so
        short that launching their kernels would hold it up, and leave a quarter of the memory free.
    :param float8: matrix products of the blocks' linears in float8, with a scale for each tensor (``tensorwise``) or for each row
        and column (``rowwise``); null for bf16. Needs the extra ``float8``, and a GPU of compute capability 8.9 or higher.
    """

    key: ClassVar[str] = "train"

    sequence_length: Annotated[int, Range(1, 2**30, unit="tokens")] = 4096
    global_batch_size: Annotated[int, Range(1, 2**30, unit="sequences")] = 1024
    microbatch_size: Annotated[int, Range(1, 2**30, unit="sequences")] | Auto = 8
    max_tokens: Tokens | None = None
    max_steps: Steps | None = None
    seed: Seed = 0
    save_folder: str | None = None
    load_path: str | None = None
    load_other_reads: bool = False
    compile: bool | None = None
    cuda_graph: bool | None = None
    float8: Float8 | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_other_reads and self.load_path is None:
            raise UserError("train.load_path", "a checkpoint where train.load_other_reads is true", "null")
        if (self.max_tokens is None) == (self.max_steps is None):
            both = "neither" if self.max_tokens is None else "both"
            raise UserError("train.max_tokens", "exactly one of train.max_tokens and train.max_steps", both)

    @property
    def microbatch(self) -> int:
        """``microbatch_size`` once it is a number: in the configuration of a plan."""
        assert isinstance(self.microbatch_size, int)
        return self.microbatch_size

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
class ParallelConfig(Section):
    """``parallel``: how several processes share the work.

    :param data: ``fsdp`` (FSDP2), ``hsdp`` or ``ddp``.
    :param shard_degree: ranks that share one copy of the model under ``hsdp``; null for one host's.
    :param prefetch: blocks whose parameters FSDP gathers ahead.
    :param hang_timeout: seconds without a sign of life after which a rank is named and the job ended; null for never.
    :param tensor: tensor-parallel ranks, which share heads, their depth slots and the FFN.
    :param context: context-parallel ranks, which share the tokens of each sequence; for ``moda`` and models without depth.
    :param pipeline: pipeline-parallel ranks, which share the layers; 1 for mechanisms that keep more than slots between layers.
    :param stages_per_rank: stages of each pipeline-parallel rank: with more of them ranks wait less and send more.
    :param activation_checkpointing: what is recomputed in the backward pass; ``auto`` for nothing, or ``full`` where by the
        estimate not even one sequence fits otherwise.
    :param block_interval: every how many blocks, for ``selected_blocks``.
    :param modules: globs of module names, for ``selected_modules``.
    :param memory_budget: from 0 (recompute all) to 1, for ``budget``.
    """

    key: ClassVar[str] = "parallel"

    data: DataParallel = DataParallel.fsdp
    shard_degree: Annotated[int, Range(1, unit="processes")] | None = None
    prefetch: Annotated[int, Range(0, unit="blocks")] = 0
    hang_timeout: Annotated[float, Range(1, unit="seconds")] | None = 600.0
    tensor: Annotated[int, Range(1, unit="processes")] = 1
    context: Annotated[int, Range(1, unit="processes")] = 1
    pipeline: Annotated[int, Range(1, unit="processes")] = 1
    stages_per_rank: Annotated[int, Range(1, unit="stages")] = 1
    activation_checkpointing: Checkpointing = Checkpointing.none
    block_interval: Annotated[int, Range(1, unit="blocks")] | None = None
    modules: list[str] | None = None
    memory_budget: Share | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        wrapped = (Checkpointing.full, Checkpointing.selected_blocks, Checkpointing.selected_ops)
        if self.prefetch and mode in wrapped and self.data != DataParallel.ddp:
            reason = "FSDP prefetches blocks, which this activation_checkpointing wraps"
            raise UserError(
                "parallel.prefetch", f"0 with parallel.activation_checkpointing: {mode.value}", self.prefetch, reason
            )
        if self.tensor > 1 and self.data == DataParallel.ddp:
            raise UserError(
                "parallel.data", "fsdp or hsdp with parallel.tensor", "ddp", "DDP keeps no distributed tensors"
            )
        if self.context > 1 and self.data != DataParallel.fsdp:
            raise UserError("parallel.data", "fsdp with parallel.context", self.data.value)
        if self.context > 1 and self.tensor > 1:
            raise UserError("parallel.context", "1 with parallel.tensor", self.context, "they do not work together yet")
        if self.stages_per_rank > 1 and self.pipeline == 1:
            raise UserError("parallel.stages_per_rank", "1 without parallel.pipeline", self.stages_per_rank)
        if self.pipeline > 1:
            for key in ("tensor", "context"):
                if getattr(self, key) > 1:
                    reason = "they do not work together yet"
                    raise UserError(f"parallel.{key}", "1 with parallel.pipeline", getattr(self, key), reason)
            if self.data == DataParallel.ddp:
                reason = "stages compute through FSDP, whatever the number of pipelines"
                raise UserError("parallel.data", "fsdp or hsdp with parallel.pipeline", "ddp", reason)
        if self.shard_degree is not None and self.data != DataParallel.hsdp:
            raise UserError("parallel.shard_degree", "null unless parallel.data is hsdp", self.shard_degree)


@dataclass
class DownstreamSection(Section):
    """``eval.downstream``: multiple-choice tasks in the training loop.

    :param tasks: names of the tasks, as ``scripts/eval.py --tasks`` takes them.
    :param interval: every how many steps; null for only at the ends.
    :param limit: only the first so many questions of each; null for all.
    """

    key: ClassVar[str] = "eval.downstream"

    tasks: list[str]
    interval: Steps | None = 1000
    limit: Annotated[int, Range(1, unit="questions")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise UserError("eval.downstream.tasks", "at least one task", self.tasks)


@dataclass
class EvalConfig(Section):
    """``eval``: validation loss in the training loop, and tasks.

    :param interval: every how many steps; null for only at the ends.
    :param on_start: before the first step.
    :param on_finish: after the last step.
    :param max_batches: of each validation set at most so many batches, spread evenly over it; null for all of it.
    :param downstream: tasks to run as well.
    """

    key: ClassVar[str] = "eval"

    interval: Steps | None = 1000
    on_start: bool = True
    on_finish: bool = True
    max_batches: Annotated[int, Range(1, unit="batches")] | None = None
    downstream: DownstreamSection | None = None


@dataclass
class CheckpointConfig(Section):
    """``checkpoint``: what is saved and kept.

    :param interval: permanent checkpoints, every how many steps.
    :param ephemeral_interval: checkpoints that the next one replaces, every how many steps; null for none.
    :param keep: permanent checkpoints to keep, those of earlier sessions of the run included; null for all.
    :param save_async: write in the background while training goes on.
    """

    key: ClassVar[str] = "checkpoint"

    interval: Steps = 1000
    ephemeral_interval: Steps | None = None
    keep: Annotated[int, Range(1, unit="checkpoints")] | None = None
    save_async: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ephemeral_interval is not None and self.ephemeral_interval >= self.interval:
            raise UserError(
                "checkpoint.ephemeral_interval",
                f"less than checkpoint.interval ({self.interval})",
                self.ephemeral_interval,
            )


@dataclass
class WandBSection(Section):
    """``logging.wandb``: Weights & Biases (``pip install -e '.[wandb]'``).

    :param enabled: send metrics there. The variable ``WANDB_API_KEY`` holds the key; ``WANDB_MODE=offline`` needs none.
    :param project: the project that runs appear in; Weights & Biases chooses if null.
    :param entity: the team or user; the key's own if null.
    :param group: a group of runs, to be shown together.
    :param tags: words to find the run by.
    """

    key: ClassVar[str] = "logging.wandb"

    enabled: bool = False
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None


@dataclass
class LoggingConfig(Section):
    """``logging``: what a run tells.

    :param interval: every how many steps metrics are collected, shown and written.
    :param layers_interval: every how many steps each layer's gradient norm, residual stream and shares of the attention are
        written; null for never. Needs the extra ``hf``.
    :param wandb: Weights & Biases.
    """

    key: ClassVar[str] = "logging"

    interval: Steps = 10
    layers_interval: Steps | None = None
    wandb: WandBSection = field(default_factory=WandBSection)


@dataclass
class RunConfig(Section):
    """A whole run. Attributes are the sections of a configuration file.

    :param name: of the run, its default folder and its W&B run; the configuration file's if it has none.
    :param model: the decoder.
    :param data: what it is trained and validated on.
    :param train: batch, duration, where to.
    :param optim: the optimizer and its schedule.
    :param parallel: how several processes share the work.
    :param eval: evaluation while training.
    :param checkpoint: what is saved and kept.
    :param logging: what a run tells.
    :param description: a note for people; nothing reads it.
    """

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
        super().__post_init__()
        folder_name("name", self.name)
        if self.train.save_folder is None:
            self.train.save_folder = f"runs/{self.name}"
        size = self.train.microbatch_size
        if isinstance(size, int) and self.train.global_batch_size % size:
            raise UserError(
                "train.microbatch_size",
                f"a divisor of train.global_batch_size ({self.train.global_batch_size})",
                self.train.microbatch_size,
            )
        self._check_ranks()
        if self.data.document_masking:
            refused = self.model.refuses("document_masking")
            if self.model.depth is None:
                refused = "OLMo-core's torch attention, which runs without model.depth, has no such mask"
            elif self.parallel.context > 1:
                refused = "parallel.context cuts sequences, not documents"
            if refused is not None:
                raise UserError("data.document_masking", f"false ({refused})", True)

    def _check_ranks(self) -> None:
        """Refuse ranks that cannot share the model or a sequence."""
        tensor, refused = self.parallel.tensor, self.model.refuses("tensor_parallel")
        if tensor > 1 and refused is not None:
            raise UserError("parallel.tensor", f"1 with this model.depth ({refused})", tensor)
        context, refused = self.parallel.context, self.model.refuses("context_parallel")
        if context > 1 and refused is not None:
            raise UserError("parallel.context", f"1 with this model.depth ({refused})", context)
        if context > 1 and self.train.sequence_length % (2 * context):
            expected = f"a multiple of 2 x parallel.context ({2 * context})"
            raise UserError("train.sequence_length", expected, self.train.sequence_length)
        pipeline, refused = self.parallel.pipeline, self.model.refuses("pipeline_parallel")
        if pipeline > 1 and refused is not None:
            raise UserError("parallel.pipeline", f"1 with this model.depth ({refused})", pipeline)
        stages = pipeline * self.parallel.stages_per_rank
        if stages > self.model.n_layers:
            raise UserError(
                "parallel.pipeline",
                f"with stages_per_rank at most model.n_layers ({self.model.n_layers}) stages",
                stages,
            )
        if pipeline > 1 and self.logging.layers_interval is not None:
            expected = "null with parallel.pipeline (no rank has the whole model)"
            raise UserError("logging.layers_interval", expected, self.logging.layers_interval)
        sizes = {
            "model.n_kv_heads": self.model.n_kv_heads,
            "model.ffn_hidden_size": self.model.ffn_hidden_size,
            "train.sequence_length": self.train.sequence_length,
        }
        for key, size in sizes.items():
            assert size is not None
            if size % tensor:
                raise UserError("parallel.tensor", f"a divisor of {key} ({size})", tensor)

    @property
    def save_folder(self) -> str:
        """Where checkpoints go: a folder, or a URL of a bucket."""
        assert self.train.save_folder is not None
        return self.train.save_folder

    @property
    def log_folder(self) -> str:
        """Where log, metrics and summary go: the save folder, or ``runs/<name>`` if that is remote."""
        return f"runs/{self.name}" if "://" in self.save_folder else self.save_folder
