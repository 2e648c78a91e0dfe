"""What a training process needs of memory, by purpose, and the largest microbatch that fits.

Activations are what the compiler's partitioner saves for the backward pass (``tests/train/test_memory.py`` compares), or autograd
where blocks are not compiled. The peak is one of three moments: the loss, with all activations there; the backward pass of the
last layers; the optimizer's step. What only another moment needs is left out. So are fragmentation and the CUDA context, for
which :data:`USABLE` leaves room. ``bench.py memory`` compares estimates with measured peaks.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moda.config.choices import Backend, Checkpointing, DataParallel, QKNorm
from moda.config.schema import RunConfig
from moda.errors import UserError
from moda.model import ModelTransformerConfig
from moda.model.loss import chunk_rows
from moda.model.pipeline import most_in_flight
from moda.model.stages import Stage, make_stages
from moda_kernels.depth.stream import DEFER

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["ASSUMED", "Device", "a_gpu", "check_memory", "estimate_memory", "fitted", "out_of_memory", "this_machine"]

# Corrections from measured peaks (docs/benchmarks/table_memory.csv) go here and nowhere else.
#: Measured over computed activations.
ACTIVATIONS = 1.0
#: Measured over computed memory of one layer's backward pass.
BACKWARD = 1.0
#: Bytes that libraries' workspaces take of PyTorch's allocator on a GPU.
WORKSPACE = 0.1 * 2**30
#: Share of a GPU's memory that ``auto`` fills; the rest is the CUDA context's, NCCL's, and lost to fragmentation.
USABLE = 0.92
#: The same of a host's memory.
USABLE_HOST = 0.7
#: Training is refused where the estimate is so many times the memory there is: the estimate is not that wrong.
REFUSED = 1.25
#: What is kept where ``selected_ops`` recomputes every other matrix product and what is cheap.
SELECTED_OPS = 0.6


@dataclass(frozen=True)
class Device:
    """The memory that a process trains in.

    :param memory: bytes.
    :param gpu: whether it is a GPU's; else the process's share of the host's.
    :param name: for messages.
    """

    memory: float
    gpu: bool
    name: str

    @property
    def room(self) -> float:
        """What ``auto`` may fill."""
        return self.memory * (USABLE if self.gpu else USABLE_HOST)

    def __str__(self) -> str:
        return f"{self.memory / 2**30:,.1f} GiB of {self.name}"


def a_gpu(gib: float) -> Device:
    """A GPU that need not be here."""
    return Device(gib * 2**30, True, "an assumed GPU")


#: Where Linux tells the limit of a container's memory, in its second and first form.
_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
#: What is planned for on a machine without a GPU.
ASSUMED = a_gpu(80)


def _container_limits(files: Iterable[str] = _LIMITS) -> list[float]:
    """Bytes that a container may use, infinity where it has no limit."""
    texts = [path.read_text().strip() for path in map(Path, files) if path.is_file()]
    return [math.inf, *(float(text) for text in texts if text.isdigit())]


def this_machine() -> Device:
    """The GPU of this process, or its share of the host's memory."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return Device(torch.cuda.get_device_properties(index).total_memory, True, torch.cuda.get_device_name(index))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_container_limits())
    name = "this host" if processes == 1 else f"this host for each of its {processes} processes"
    return Device(host / processes, False, name)


@dataclass(frozen=True)
class _Share:
    """What a process has of a model: all of it, or its stages of a pipeline.

    :param layers: how many. :param params: parameters.
    :param in_flight: microbatches that wait for their backward pass, through all of its layers.
    """

    layers: int
    params: float
    in_flight: float = 1
    stages: tuple[Stage, ...] = ()


def _shares(config: RunConfig, t: ModelTransformerConfig, world_size: int) -> list[_Share]:
    parallel, train = config.parallel, config.train
    ranks = parallel.pipeline
    if ranks == 1:
        return [_Share(t.n_layers, t.num_params)]
    head = t.d_model * t.vocab_size
    block = (t.num_params - head * (1 if t.tie_word_embeddings else 2)) / t.n_layers
    microbatches = train.global_batch_size * ranks // (world_size * train.microbatch)
    shares = []
    stages = make_stages(t.model, ranks, t.vocab_size, parallel.stages_per_rank)
    for rank in range(ranks):
        own = tuple(stages[rank::ranks])
        layers = sum(s.end - s.first for s in own)
        params = block * layers + head * sum(s.is_first + s.is_last for s in own)
        passed = most_in_flight(rank, ranks, len(own), microbatches)
        shares.append(_Share(layers, params, passed / len(own), own))
    return shares


def _shards(config: RunConfig, world_size: int) -> int:
    """Over how many processes parameters, gradients and optimizer state are spread."""
    tensor, data = config.parallel.tensor, config.parallel.data
    if data == DataParallel.fsdp:
        return world_size
    if data == DataParallel.ddp:
        return tensor
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    return tensor * (config.parallel.shard_degree or min(local, world_size // tensor))


def _states(
    config: RunConfig, t: ModelTransformerConfig, share: _Share, world_size: int, gpu: bool, size: int
) -> dict[str, float]:
    """Parameters and what goes with them, fp32 but for the copies that compute: gathered by FSDP, or of all for one process."""
    shards, params, tensor = _shards(config, world_size), float(share.params), config.parallel.tensor
    out = {
        "parameters": 4 * params / shards,
        "gradients": 4 * params / shards,
        "optimizer (two moments)": 8 * params / shards,
    }
    if share.stages:  # a stage's stay gathered from its first forward pass to its last backward pass
        out["gathered copies (FSDP)"] = size * params
    elif world_size == 1:
        if gpu:
            out["bf16 copies"] = 2 * params
    elif config.parallel.data == DataParallel.ddp:
        out["buckets of gradients"] = 4 * params / shards
        if gpu:
            out["bf16 copies"] = 2 * params / shards
    else:
        outside = t.d_model * t.vocab_size * (1 if t.tie_word_embeddings else 2)
        gathered = outside + (2 + config.parallel.prefetch) * (params - outside) / t.n_layers
        out["gathered copies (FSDP)"] = size * gathered / tensor
    return out


def _block(
    t: ModelTransformerConfig, tokens: float, size: int, compiled: bool, float8: bool = False
) -> dict[str, float]:
    """Bytes that one block keeps for its backward pass.

    Every matrix product keeps its input, every norm its own, attention q, k, v, its output and its log-sum-exp, and the FFN both
    projections and their product. OLMo-core's attention repeats keys and values for all query heads; with a depth mechanism q, k
    and v are one product, of one joint matrix. Without a compiler a norm keeps two fp32 tensors, and the FFN its gate twice. With
    one, products in float8 keep the FFN's input and the joint matrix in one byte, and not the product of its two projections,
    which is made and rounded again.
    """
    model = t.model
    assert model.head_dim is not None and model.n_kv_heads is not None
    d, q, kv, f = t.d_model, t.query_width, model.n_kv_heads * model.head_dim, model.ffn_hidden_size
    normed = 0 if model.qk_norm == QKNorm.none else q + kv
    fixed, rounded = 0.0, compiled and float8
    if model.depth is not None:
        attention = (q + 2 * kv) + q + kv + q
        fixed = float((1 if rounded else size) * d * (q + 2 * kv))
    else:
        attention = normed + q + (2 * kv if kv == q else 2 * q) + q
    norms = 2 * d * len(model.norm_placement.norms)
    wide = 8 if compiled is False else size
    ffn = d + 2 * f * size if rounded else size * (d + (3 if compiled else 4) * f)
    eager_qk = 0 if compiled else normed * (8 if model.depth is not None else 8 - size)
    return {
        "attention": tokens * (size * (d + attention) + 4 * model.n_heads + eager_qk) + fixed,
        "FFN": tokens * ffn,
        "norms and residuals": tokens * wide * norms,
    }


def _kept(config: RunConfig) -> float:
    """The share of blocks' activations that activation checkpointing leaves."""
    mode, p = config.parallel.activation_checkpointing, config.parallel
    if mode == Checkpointing.full:
        return 0.0
    if mode == Checkpointing.selected_blocks:
        return 1 - 1 / (p.block_interval or 1)
    if mode == Checkpointing.selected_ops:
        return SELECTED_OPS
    return p.memory_budget or 0.0 if mode == Checkpointing.budget else 1.0


def slots_memory(
    t: ModelTransformerConfig, tokens: float, size: int, gpu: bool, stage: Stage | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """The depth stream's buffers: those of the whole pass, and those of the backward pass."""
    model = t.model
    layout = None if model.depth is None else model.depth.layout(model.n_layers)
    if layout is not None and stage is not None:
        layout = layout.part(stage.first, stage.end)
    if layout is None or not layout.n_slots:
        return {}, {}
    assert model.head_dim is not None and model.n_kv_heads is not None
    rows, shift, total = layout.training
    row = 2 * tokens * model.n_kv_heads * model.head_dim * size
    own = total - layout.n_slots if shift >= layout.n_slots else 0
    slot = 2 * tokens * model.n_kv_heads * (model.head_dim + 4) if layout.quantised else row
    forward = {f"depth keys and values{' (fp8)' if layout.quantised else ''}": slot * (total - own)}
    backward = {"gradients of depth keys and values": row * own}
    if gpu and model.attention_backend in (Backend.auto, Backend.split):
        waiting = min(DEFER, model.n_layers) * 2 * (rows[-1] + 1 + model.head_dim)
        backward["deferred depth gradients"] = waiting * tokens * model.n_heads * size
    return forward, backward


def _crossing_memory(
    t: ModelTransformerConfig, share: _Share, tokens: float, size: int, gpu: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """:func:`slots_memory` of all microbatches in flight, with what crosses the cuts of a pipeline."""
    if not share.stages:
        return slots_memory(t, tokens, size, gpu)
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for s in share.stages:
        of_pass, of_backward = slots_memory(t, tokens, size, gpu, s)
        forward |= {name: forward.get(name, 0.0) + n * share.in_flight for name, n in of_pass.items()}
        backward |= {name: max(backward.get(name, 0.0), n) for name, n in of_backward.items()}
    crossing = max(2 * (s.numbers(s.entering) + s.numbers(s.leaving)) for s in share.stages)
    # Slots are kept for as many microbatches as there are ranks.
    kept = max(s.ranks * (s.numbers(s.kept) - s.width) for s in share.stages)
    backward["what crosses cuts, with its gradients"] = tokens * size * (crossing + kept)
    return forward, backward


def _memory(config: RunConfig, t: ModelTransformerConfig, world_size: int, gpu: bool) -> dict[str, float]:
    """By purpose, of the process that needs most."""
    replicas = world_size // config.parallel.pipeline
    each = [_memory_of(config, t, share, replicas, gpu) for share in _shares(config, t, world_size)]
    return max(each, key=lambda parts: sum(parts.values()))


def _memory_of(
    config: RunConfig, t: ModelTransformerConfig, share: _Share, world_size: int, gpu: bool
) -> dict[str, float]:
    tensor, context = config.parallel.tensor, config.parallel.context
    tokens, size = config.train.microbatch * config.train.sequence_length / context, 2 if gpu else 4
    compiled = gpu if config.train.compile is None else config.train.compile
    states = _states(config, t, share, world_size, gpu, size)
    if gpu:
        states["workspaces"] = WORKSPACE
    depth, model = t.model.depth, t.model

    kept = _kept(config)
    rounded = config.train.float8 is not None
    block = {name: ACTIVATIONS * n / tensor for name, n in _block(t, tokens, size, compiled, rounded).items()}
    for name in ("attention", "FFN"):  # ranks that share heads keep their inputs whole
        block[name] += ACTIVATIONS * tokens * size * t.d_model * (1 - 1 / tensor)
    if context > 1:  # keys and values of all ranks
        block["attention"] += 2 * tokens * context * size * t.query_width * (model.n_kv_heads or 0) / model.n_heads
    # What a mechanism keeps has the heads of the rank; all that is between sublayers has its tokens.
    layers = share.layers * share.in_flight
    inside = 0.0 if depth is None else depth.block_memory(model, tokens / tensor, size)
    parts: dict[str, float] = {}
    for name, n in block.items():
        parts[f"activations: {name}"] = kept * n * layers
    if inside:
        parts[f"activations: {depth.name if depth else ''}"] = kept * inside * layers / t.n_layers
    stream = tokens * t.d_model * size / tensor
    parts["activations: block inputs"] = (1 - kept) * layers * stream
    parts["activations: head"] = stream
    slots, late = _crossing_memory(t, share, tokens / tensor, size, gpu)
    parts |= slots
    if depth is not None:
        kept_between = depth.memory(model, tokens / tensor, size)
        parts |= {name: n * layers / t.n_layers for name, n in kept_between.items()}
        late |= depth.backward_memory(model, tokens / tensor, size)
    head = t.d_model * t.vocab_size
    if tensor > 1:
        loss = 10.0 * tokens * t.vocab_size / tensor
    else:
        rows = min(int(tokens), chunk_rows(t.d_model, t.vocab_size, size, gpu))
        loss = rows * t.vocab_size * size + head * ((4 + size) if size < 4 else size) + 2 * stream
    per_block = (t.num_params - head) / t.n_layers / tensor
    one = sum(block.values()) + inside / t.n_layers
    layer = BACKWARD * tokens * size * (3 * model.ffn_hidden_size / tensor + 2 * t.d_model)
    if kept < 1:
        layer += one
    elif slots:  # their gradients come when the last layer's activations have gone
        parts["activations: last layer, gone by then"] = -one
    backward = {"backward pass of a layer": layer + 6 * per_block + size * head, **late}
    if sum(backward.values()) + min(parts.values()) < loss:
        parts.pop("activations: last layer, gone by then", None)
        parts["loss, in chunks"] = loss
    else:
        parts |= backward
    step = {"step of the optimizer": 16.0 * head / _shards(config, world_size)}
    parts = max(parts, step, key=lambda moment: sum(moment.values()))
    return {name: n for name, n in (states | parts).items() if n}


def estimate_memory(plan: Plan) -> dict[str, float]:
    """Bytes that a process of a run needs at its peak, by purpose: bf16 on a GPU, fp32 on a CPU."""
    return _memory(plan.config, plan.transformer, plan.world_size, plan.device.gpu)


def _divisors(n: int) -> list[int]:
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def fitted(config: RunConfig, t: ModelTransformerConfig, world_size: int, device: Device) -> RunConfig:
    """The configuration with numbers for ``auto``: the largest microbatch that fits, with checkpointing if otherwise none does.

    With a pipeline a step has enough microbatches for its ranks to wait little.

    Where nothing fits it is what needs least.

    :param config: whose global batch the processes can share.
    """
    train, parallel = config.train, config.parallel
    if isinstance(train.microbatch_size, int):
        sizes = [train.microbatch_size]
    else:
        ranks, turns = parallel.pipeline, parallel.stages_per_rank
        together = parallel.tensor * parallel.context * (ranks if turns == 1 else 1)
        sizes = _divisors(train.global_batch_size * together // world_size)
        if ranks > 1:  # so many microbatches that ranks wait for a tenth of the time at most, if there can be
            turns *= train.global_batch_size * ranks // world_size
            sizes = [n for n in sizes if turns // n >= 9 * (ranks - 1)] or sizes[:1]
    modes = [parallel.activation_checkpointing]
    if modes == [Checkpointing.auto]:
        modes = [Checkpointing.none] if parallel.prefetch else [Checkpointing.none, Checkpointing.full]

    def chosen(mode: Checkpointing, size: int) -> RunConfig:
        return dataclasses.replace(
            config,
            train=dataclasses.replace(train, microbatch_size=size),
            parallel=dataclasses.replace(parallel, activation_checkpointing=mode),
        )

    def too_large(mode: Checkpointing, size: int) -> bool:
        return sum(_memory(chosen(mode, size), t, world_size, device.gpu).values()) > device.room

    if len(sizes) == len(modes) == 1:
        return chosen(modes[0], sizes[0])
    for mode in modes:
        if fit := bisect.bisect_left(sizes, True, key=functools.partial(too_large, mode)):
            return chosen(mode, sizes[fit - 1])
    return chosen(modes[-1], sizes[0])


def _less(plan: Plan) -> str:
    """What to change for less memory."""
    ways, parallel = [], plan.config.parallel
    if plan.config.train.microbatch > 1:
        ways.append("a smaller train.microbatch_size")
    if parallel.activation_checkpointing != Checkpointing.full:
        ways.append("parallel.activation_checkpointing=full")
    if parallel.data != DataParallel.fsdp:
        ways.append("parallel.data=fsdp")
    if plan.device.gpu:
        ways.append("more GPUs")
    elif plan.world_size > 1:
        ways.append("fewer processes per host")
    return ", ".join(ways or ["a smaller model"])


def check_memory(plan: Plan) -> None:
    """Refuse a run that cannot fit, before anything of it is loaded.

    :raises UserError: where the estimate is more than :data:`REFUSED` times the memory that is there.
    """
    needed = sum(estimate_memory(plan).values())
    if needed > REFUSED * plan.device.memory:
        asked = f"{plan.config.train.microbatch}, which needs about {needed / 2**30:,.1f} GiB per process"
        raise UserError("train.microbatch_size", f"a run that fits the {plan.device}", asked, f"try {_less(plan)}")


def out_of_memory(plan: Plan, error: BaseException) -> UserError | None:
    """The error as one line, if it or what it was raised for is about memory."""
    cause: BaseException | None = error
    for _ in range(20):
        if cause is None:
            return None
        said = str(cause)  # those of the driver and of NCCL have no type of their own
        words = ("out of memory", "can't allocate memory")
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or any(word in said for word in words):
            break
        cause = cause.__cause__ or cause.__context__
    else:
        return None
    size = said.split("Tried to allocate ")[-1].split(". ")[0] if "Tried to allocate " in said else ""
    asked = f"{size} more were asked for; " if size else ""
    estimate = sum(estimate_memory(plan).values()) / 2**30
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    return UserError(
        "train.microbatch_size",
        f"a run that fits the {plan.device}",
        f"{plan.config.train.microbatch} and out of memory{rank}",
        f"{asked}the estimate was {estimate:,.1f} GiB; try {_less(plan)}",
        every_rank=True,
    )
