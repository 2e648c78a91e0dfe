"""What a configuration comes to before anything is built: sizes, FLOPs, memory, steps, and whether it can run at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from moda.config.choices import Auto, Backend, Checkpointing
from moda.config.names import own_folder
from moda.config.schema import DataParallel, RunConfig
from moda.data import Tokenizer, load_tokenizer
from moda.errors import UserError
from moda.model import ModelTransformerConfig, transformer_config
from moda.model.stages import make_stages
from moda_kernels.moda_attention.quantised import fp8_missing

from .float8 import check_float8
from .memory import ASSUMED, Device, estimate_memory, fitted, this_machine

__all__ = ["Plan", "make_plan"]

#: FLOPs of a microbatch below which CUDA graphs pay: about a quarter of a second on an H100.
_SHORT = 1e14
#: Share of a device's memory above which they do not: a graph holds its activations while an evaluation needs memory too.
_AMPLE = 0.75


@dataclass(frozen=True)
class Plan:
    """A checked run.

    :param config: the resolved configuration, without ``auto``.
    :param tokenizer: the data's tokenizer.
    :param transformer: OLMo-core's form of the model.
    :param world_size: processes that train.
    :param device: the memory that each of them is planned for.
    """

    config: RunConfig
    tokenizer: Tokenizer
    transformer: ModelTransformerConfig
    world_size: int
    device: Device

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, causal attention counted half."""
        return self.transformer.num_flops_per_token(self.config.train.sequence_length)

    @property
    def graphs_pay(self) -> bool:
        """Whether a microbatch is too short for the host to launch its kernels in time (and can be captured, and held)."""
        c = self.config
        flops = self.flops_per_token * c.train.sequence_length * c.train.microbatch
        ample = sum(estimate_memory(self).values()) <= _AMPLE * self.device.memory
        return flops < _SHORT and ample and not self.cannot_capture

    @property
    def cannot_capture(self) -> str | None:
        """Why a microbatch cannot be a CUDA graph, or None if it can."""
        if self.world_size > 1:
            return f"{self.world_size} processes exchange gradients within it"
        if self.config.data.document_masking:
            return "with data.document_masking its shapes are those of the documents"
        if self.config.parallel.activation_checkpointing != Checkpointing.none:
            return "activation_checkpointing reads the state of the random numbers back"
        return None

    @property
    def paper_forward_flops(self) -> int:
        """Forward FLOPs of one sequence as the paper's Table 3 counts them (full attention square)."""
        return self.transformer.paper_forward_flops(self.config.train.sequence_length)

    def sizes(self) -> dict[str, int]:
        """What a report says of the model, by name (``plan.json``)."""
        length = self.config.train.sequence_length
        return {
            "parameters": self.transformer.num_counted_params,
            "flops_per_token": self.flops_per_token,
            "forward_flops": self.paper_forward_flops,
            "forward_flops_causal": self.transformer.paper_forward_flops(length, causal=True),
        }

    def proposal(self) -> list[tuple[str, str]]:
        """The settings that fit the devices, whatever the configuration says."""
        fit = _proposal(self)
        if fit is None:
            return [("proposed", f"nothing fits the {self.device}: more GPUs share the model under parallel.data=fsdp")]
        parallel = fit.parallel
        degree = "" if parallel.shard_degree is None else f" parallel.shard_degree={parallel.shard_degree}"
        memory = sum(estimate_memory(dataclasses.replace(self, config=fit)).values())
        settings = (
            f"train.microbatch_size={fit.train.microbatch} parallel.data={parallel.data.value}{degree} "
            f"parallel.activation_checkpointing={parallel.activation_checkpointing.value}"
        )
        return [("proposed", f"{settings} ({memory / 2**30:,.1f} GiB)")]

    def duration(self, mfu: float, peak: float) -> list[tuple[str, str]]:
        """How long the run takes if ``mfu`` of each device's ``peak`` FLOP/s go into the model."""
        train = self.config.train
        seconds = self.steps * train.tokens_per_step * self.flops_per_token / (mfu * peak)
        hours = seconds / 3600
        assumed = f"assumed: MFU {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s; no evaluation, no checkpoints"
        return [
            ("GPU-hours", f"{hours:,.4g} ({assumed})"),
            (f"days on {self.world_size} GPU{'s' * (self.world_size > 1)}", f"{hours / 24 / self.world_size:,.4g}"),
        ]

    def rows(self) -> list[tuple[str, str]]:
        """What ``--dry-run`` prints below the configuration."""
        t, train = self.transformer, self.config.train
        rows = [("parameters", f"{t.num_counted_params:,}")]
        if t.num_padding_params:
            rows.append(("padding parameters (not counted above)", f"{t.num_padding_params:,}"))
        if t.model.depth is not None:
            rows.append(("depth mechanism", f"{t.model.depth.name} ({t.num_depth_params:,} parameters)"))
            rows += t.model.depth.describe(t.model)
        rows += [
            ("training FLOPs per token (attention counted half)", f"{self.flops_per_token / 1e9:,.3f} G"),
            ("forward FLOPs per sequence (paper's Table 3)", f"{self.paper_forward_flops / 1e12:,.4g} T"),
            ("tokens per step", f"{train.tokens_per_step:,}"),
            ("steps", f"{self.steps:,}"),
            ("tokens in all", f"{self.steps * train.tokens_per_step:,}"),
            ("processes", f"{self.world_size}"),
            ("sequences per microbatch", f"{train.microbatch}"),
            ("activation checkpointing", self.config.parallel.activation_checkpointing.value),
        ]
        rows += self._pipeline_rows()
        memory = estimate_memory(self)
        total, device = sum(memory.values()), self.device
        fits = "" if total <= device.room else ", more than fits" if total <= device.memory else ", more than there is"
        rows.append(("memory per process (estimate)", f"{total / 2**30:,.2f} GiB{fits} ({device})"))
        rows += [(f"  {name}", f"{value / 2**30:,.2f} GiB") for name, value in memory.items()]
        return rows

    def _pipeline_rows(self) -> list[tuple[str, str]]:
        c = self.config
        ranks, per_rank = c.parallel.pipeline, c.parallel.stages_per_rank
        if ranks == 1:
            return []
        stages = make_stages(c.model, ranks, self.transformer.vocab_size, per_rank)
        microbatches = c.train.global_batch_size * ranks // (self.world_size * c.train.microbatch)
        idle = (ranks - 1) / (microbatches * per_rank + ranks - 1)
        sent = ", ".join(f"{2 * s.numbers_sent:,} ({len(s.sent)} slots)" for s in stages[:-1])
        return [
            ("layers of each stage", ", ".join(f"{s.first}-{s.end - 1}" for s in stages)),
            ("microbatches per step", f"{microbatches}; stages wait for {idle:.1%} of the time"),
            ("bytes per token across each cut, each way (bf16)", sent),
        ]


def _proposal(p: Plan) -> RunConfig | None:
    """The fastest settings that fit: the fewest processes that share a model, no recomputation, the largest microbatch."""
    parallel, train = p.config.parallel, p.config.train
    kinds: list[tuple[DataParallel, int | None]] = [(DataParallel.fsdp, None)]
    if p.world_size > 8 and p.world_size % 8 == 0 and parallel.context == parallel.pipeline == 1:
        kinds.insert(0, (DataParallel.hsdp, 8))  # a host's links are faster than those between hosts
    for data, degree in kinds:
        options: dict[str, Any] = dict(data=data, shard_degree=degree, activation_checkpointing=Checkpointing.auto)
        none: dict[str, Any] = dict(block_interval=None, modules=None, memory_budget=None)
        asked = dataclasses.replace(
            p.config,
            train=dataclasses.replace(train, microbatch_size=Auto.auto),
            parallel=dataclasses.replace(parallel, **options, **none),
        )
        fit = fitted(asked, p.transformer, p.world_size, p.device)
        if sum(estimate_memory(dataclasses.replace(p, config=fit)).values()) <= p.device.room:
            return fit
    return None


def make_plan(config: RunConfig, world_size: int, device: Device | None = None) -> Plan:
    """Check what concerns several sections and the number of processes, and choose what is ``auto``.

    :param device: the memory to plan for: by default that of this machine's GPU, or of one with 80 GiB.

    :raises UserError: naming the key.
    """
    train, parallel = config.train, config.parallel
    own_folder("train.save_folder", config.save_folder, remote=True)
    own_folder("data.work_dir", config.data.work_dir)
    assert not isinstance(config.data.tokenizer, str)
    tokenizer = load_tokenizer(config.data.tokenizer)
    transformer = transformer_config(config.model, tokenizer.config.vocab_size)
    vocab = transformer.vocab_size - transformer.lm_head.padding
    if vocab < tokenizer.config.vocab_size:
        raise UserError(
            "model.vocab_size", f"at least the tokenizer's {tokenizer.config.vocab_size} ({tokenizer.name})", vocab
        )
    for key in ("tensor", "context", "pipeline"):  # at most one of them is more than 1
        if world_size % getattr(parallel, key):
            raise UserError(f"parallel.{key}", f"a divisor of the {world_size} processes", getattr(parallel, key))
    replicas = world_size // (parallel.tensor * parallel.context * parallel.pipeline)
    if parallel.data == DataParallel.hsdp:
        if world_size == 1:
            raise UserError("parallel.data", "fsdp or ddp with one process", "hsdp")
        if parallel.shard_degree is not None and replicas % parallel.shard_degree:
            raise UserError("parallel.shard_degree", f"a divisor of the {replicas} processes", parallel.shard_degree)
    if parallel.stages_per_rank > 1:  # whose turns are for as many microbatches as there are ranks
        replicas *= parallel.pipeline
    if not isinstance(train.microbatch_size, int):
        if train.global_batch_size % replicas:
            expected = f"a multiple of the {replicas} processes"
            raise UserError("train.global_batch_size", expected, train.global_batch_size)
    elif train.global_batch_size % (train.microbatch_size * replicas):
        raise UserError(
            "train.global_batch_size",
            f"a multiple of train.microbatch_size x processes ({train.microbatch_size} x {replicas})",
            train.global_batch_size,
        )
    device = device or (this_machine() if torch.cuda.is_available() else ASSUMED)
    made = Plan(fitted(config, transformer, world_size, device), tokenizer, transformer, world_size, device)
    if train.cuda_graph:
        reason = "this machine has no CUDA device" if not torch.cuda.is_available() else made.cannot_capture
        if reason is not None:
            raise UserError("train.cuda_graph", "false or null here", True, reason)
    check_float8(made.config)
    backend = config.model.attention_backend
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if backend in (Backend.fused, Backend.split) and not (torch.cuda.is_available() or interpreted):
        hint = "its kernels need a CUDA device, and this machine has none"
        raise UserError("model.attention_backend", "auto or reference here", backend.value, hint)
    layout = None if config.model.depth is None else config.model.depth.layout(config.model.n_layers)
    if layout is not None and layout.quantised and backend != Backend.reference and torch.cuda.is_available():
        if (reason := fp8_missing(torch.device("cuda", torch.cuda.current_device()))) is not None:
            raise UserError("model.depth.slot_dtype", "null on this GPU", "fp8", reason)
    if config.logging.layers_interval is not None and importlib.util.find_spec("transformers") is None:
        raise UserError("logging.layers_interval", "null without transformers", hint="pip install -e '.[hf]'")
    if config.logging.wandb.enabled and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb.enabled", "false without wandb", True, "pip install -e '.[wandb]'")
    if config.logging.wandb.enabled and wandb_needs_key() and not os.environ.get("WANDB_API_KEY"):
        hint = "export WANDB_API_KEY=..., or WANDB_MODE=offline, which needs none"
        raise UserError("logging.wandb.enabled", "false without the variable WANDB_API_KEY", True, hint)
    if config.optim.warmup_steps >= train.steps:
        raise UserError("optim.warmup_steps", f"less than the run's {train.steps} steps", config.optim.warmup_steps)
    return made


def wandb_needs_key() -> bool:
    """Whether Weights & Biases sends anything anywhere (``WANDB_MODE``)."""
    return os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")
