"""What a configuration comes to before anything is built: sizes, FLOPs, memory, steps, and whether it can run at all."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from moda.config.choices import Backend
from moda.config.names import own_folder
from moda.config.schema import Checkpointing, DataParallel, RunConfig
from moda.data import Tokenizer, load_tokenizer
from moda.errors import UserError
from moda.model import ModelTransformerConfig, transformer_config

__all__ = ["Plan", "estimate_memory", "make_plan"]

#: FLOPs of a microbatch below which CUDA graphs pay: about a quarter of a second on an H100.
_SHORT = 1e14


@dataclass(frozen=True)
class Plan:
    """A checked run.

    :param config: the resolved configuration.
    :param tokenizer: the data's tokenizer.
    :param transformer: OLMo-core's form of the model.
    :param world_size: processes that train.
    """

    config: RunConfig
    tokenizer: Tokenizer
    transformer: ModelTransformerConfig
    world_size: int

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, causal attention counted half."""
        return self.transformer.num_flops_per_token(self.config.train.sequence_length)

    @property
    def graphs_pay(self) -> bool:
        """Whether a microbatch is too short for the host to launch its kernels in time (and can be captured)."""
        c = self.config
        flops = self.flops_per_token * c.train.sequence_length * c.train.microbatch_size
        return flops < _SHORT and not self.cannot_capture

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
        ]
        memory = estimate_memory(self)
        rows.append(("memory per process (estimate)", f"{sum(memory.values()) / 2**30:,.2f} GiB"))
        rows += [(f"  {name}", f"{value / 2**30:,.2f} GiB") for name, value in memory.items()]
        return rows


def make_plan(config: RunConfig, world_size: int) -> Plan:
    """Check what concerns several sections and the number of processes.

    :raises UserError: naming the key.
    """
    train, parallel = config.train, config.parallel
    own_folder("train.save_folder", config.save_folder, remote=True)
    own_folder("data.work_dir", config.data.work_dir)
    assert not isinstance(config.data.tokenizer, str)
    tokenizer = load_tokenizer(config.data.tokenizer)
    transformer = transformer_config(config.model, tokenizer.config.vocab_size)
    made = Plan(config, tokenizer, transformer, world_size)
    vocab = transformer.vocab_size - transformer.lm_head.padding
    if vocab < tokenizer.config.vocab_size:
        raise UserError(
            "model.vocab_size", f"at least the tokenizer's {tokenizer.config.vocab_size} ({tokenizer.name})", vocab
        )
    if world_size % parallel.tensor:
        raise UserError("parallel.tensor", f"a divisor of the {world_size} processes", parallel.tensor)
    replicas = world_size // parallel.tensor
    if train.global_batch_size % (train.microbatch_size * replicas):
        raise UserError(
            "train.global_batch_size",
            f"a multiple of train.microbatch_size x processes ({train.microbatch_size} x {replicas})",
            train.global_batch_size,
        )
    if parallel.data == DataParallel.hsdp:
        if world_size == 1:
            raise UserError("parallel.data", "fsdp or ddp with one process", "hsdp")
        if parallel.shard_degree is not None and replicas % parallel.shard_degree:
            raise UserError("parallel.shard_degree", f"a divisor of the {replicas} processes", parallel.shard_degree)
    if train.cuda_graph:
        reason = "this machine has no CUDA device" if not torch.cuda.is_available() else made.cannot_capture
        if reason is not None:
            raise UserError("train.cuda_graph", "false or null here", True, reason)
    backend = config.model.attention_backend
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if backend in (Backend.fused, Backend.split) and not (torch.cuda.is_available() or interpreted):
        hint = "its kernels need a CUDA device, and this machine has none"
        raise UserError("model.attention_backend", "auto or reference here", backend.value, hint)
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


def estimate_memory(plan: Plan) -> dict[str, float]:
    """Bytes a process needs, by purpose. An estimate: fragmentation and kernels' scratch space are left out.

    Parameters, gradients and AdamW's two moments are fp32 (16 bytes per parameter) and sharded by FSDP; activations are bf16 on a
    GPU. Without checkpointing a layer keeps about 16 tensors of width d_model and 3 of the FFN's width for each token.
    """
    c, t = plan.config, plan.transformer
    shards = plan.world_size if c.parallel.data == DataParallel.fsdp else c.parallel.shard_degree or 1
    if c.parallel.data == DataParallel.ddp:
        shards = 1
    tokens = c.train.microbatch_size * c.train.sequence_length
    half = 2
    assert t.block.feed_forward is not None
    width = 16 * t.d_model + 3 * t.block.feed_forward.hidden_size
    kept = 1.0 if c.parallel.activation_checkpointing == Checkpointing.none else 0.15
    vocab = t.vocab_size - t.lm_head.padding
    memory = {
        "parameters, gradients, optimizer": 16.0 * t.num_params / shards,
        "activations": kept * half * tokens * width * t.n_layers,
        "logits and their gradient": 10.0 * tokens * vocab,
    }
    if t.model.depth is not None:
        memory.update(t.model.depth.memory(t.model, tokens, half))
    return memory
