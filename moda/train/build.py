"""OLMo-core's train module, data loader and trainer, built from a plan."""

import fnmatch
import json
from pathlib import Path
from typing import Any

import torch
from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig
from olmo_core.data.data_loader import NumpyDataLoaderBase
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import is_distributed
from olmo_core.io import is_url
from olmo_core.nn.transformer import Transformer
from olmo_core.optim import (
    AdamWConfig,
    CosWithWarmup,
    OptimConfig,
    OptimGroupOverride,
    SkipStepAdamWConfig,
    SkipStepOptimizer,
)
from olmo_core.train import Duration, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback, ConfigSaverCallback, GPUMemoryMonitorCallback
from olmo_core.train.callbacks.checkpointer import CheckpointRemovalStrategy
from olmo_core.train.callbacks.speed_monitor import get_device_peak_flops_per_second
from olmo_core.train.checkpoint import CheckpointerConfig
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer import (
    TransformerActivationCheckpointingConfig,
    TransformerActivationCheckpointingMode,
    TransformerContextParallelConfig,
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
)

from moda.checkpoints import OwnCheckpointer
from moda.config.schema import Checkpointing, DataParallel, Optimizer
from moda.data import TrainingData
from moda.errors import UserError
from moda.hf import section_of
from moda.model.attention import use_operator
from moda.model.stages import make_stages
from moda.typed import to_dict

from .callbacks import SealCallback, SignalCallback, SkipStepCallback, SpeedCallback, TimedCheckpointer, WandB
from .composition import CompositionCallback
from .float8 import apply_float8
from .heartbeat import HeartbeatCallback
from .layers import LayersCallback
from .module import OneProcessTrainModule
from .pipeline import PipelineTrainModule
from .plan import Plan, wandb_needs_key
from .progress import ProgressCallback
from .validation import ValidationConfig


def _optimizer(plan: Plan, model: Transformer, device: torch.device) -> OptimConfig:
    o, depth = plan.config.optim, plan.config.model.depth
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    globs = () if depth is None else depth.no_weight_decay  # OLMo-core refuses one that matches no parameter
    undecayed = ["embeddings.weight", *(glob for glob in globs if fnmatch.filter(names, glob))]
    # One pass over parameters, gradients and moments, in place of five.
    further: dict[str, Any] = {"fused": True} if o.name == Optimizer.adamw and device.type == "cuda" else {}
    cls = AdamWConfig if o.name == Optimizer.adamw else SkipStepAdamWConfig
    return cls(
        **further,
        lr=o.lr,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        group_overrides=[OptimGroupOverride(params=undecayed, opts={"weight_decay": 0.0})],
        # What a checkpoint does not bring back.
        fixed_fields=("initial_lr", "betas", "eps", "weight_decay", "foreach", "fused"),
    )


class CosineOverTokens(CosWithWarmup):
    """A warm-up in steps, then a cosine that ends with the run's budget of tokens.

    The whole run has as many steps as its budget has batches of the mean size so far: where the batch size changes on resuming,
    the learning rate goes on from where it was.
    """

    def set_lr(self, group: dict[str, Any], trainer: Trainer) -> float | torch.Tensor:
        assert trainer.max_tokens is not None
        self.t_max = trainer.max_tokens * trainer.global_step / trainer.global_train_tokens_seen  # type: ignore[assignment]
        return super().set_lr(group, trainer)


def _data_parallel(plan: Plan, half: bool) -> TransformerDataParallelConfig:
    p = plan.config.parallel
    return TransformerDataParallelConfig(
        name=DataParallelType(p.data.value),
        # DDP would cast the parameters themselves: there bf16 comes from autocast instead.
        param_dtype=DType.bfloat16 if half and p.data != DataParallel.ddp else None,
        reduce_dtype=DType.float32,
        shard_degree=p.shard_degree,
        prefetch_factor=p.prefetch,
    )


#: What trains: each has a model, or its stage's, and an optimizer.
AnyTrainModule = TransformerTrainModule | PipelineTrainModule


def build_train_module(plan: Plan, device: torch.device) -> AnyTrainModule:
    """The model with its optimizer, sharded and compiled as configured, weights initialised.

    Arithmetic is bf16 with fp32 parameters and reductions on a GPU, fp32 on a CPU.
    """
    c = plan.config
    p = c.parallel
    half = device.type == "cuda"
    checkpointing = None
    if p.activation_checkpointing != Checkpointing.none:
        checkpointing = TransformerActivationCheckpointingConfig(
            mode=TransformerActivationCheckpointingMode(p.activation_checkpointing.value),
            block_interval=p.block_interval,
            modules=p.modules,
            activation_memory_budget=p.memory_budget,
        )
    compiled = half if c.train.compile is None else c.train.compile
    if p.activation_checkpointing == Checkpointing.budget and not compiled:
        raise UserError("parallel.activation_checkpointing", "a mode other than budget without train.compile", "budget")
    model = plan.transformer.build(init_device="meta")
    model.init_seed = c.train.seed
    if p.context > 1 and c.model.depth is None:  # OLMo-core's attention does this with packages of its own alone
        for block in model.blocks.values():
            use_operator(block.attention, c.model.attention_backend.value, always=True)
    if c.train.float8 is not None:
        apply_float8(model, c.train.float8)
    schedule = CosWithWarmup if c.train.max_tokens is None else CosineOverTokens
    options: dict[str, Any] = dict(
        rank_microbatch_size=c.train.microbatch * c.train.sequence_length,
        max_sequence_length=c.train.sequence_length,
        optim=_optimizer(plan, model, device),
        max_grad_norm=c.optim.max_grad_norm,
        scheduler=schedule(warmup=c.optim.warmup_steps, alpha_f=c.optim.final_lr_ratio),
        compile_model=compiled,
        ac_config=checkpointing,
        z_loss_multiplier=c.optim.z_loss,
    )
    built: Any
    if not is_distributed():
        dtype = torch.bfloat16 if half else None
        graph = c.train.cuda_graph
        if graph is None and not (half and plan.graphs_pay):
            graph = False
        built = OneProcessTrainModule(model, half=dtype, cuda_graph=graph, device=device, **options)
    elif p.pipeline > 1:
        stages = make_stages(c.model, p.pipeline, plan.transformer.vocab_size, p.stages_per_rank)
        return PipelineTrainModule(model, stages=stages, dp_config=_data_parallel(plan, half), device=device, **options)
    else:
        built = TransformerTrainModuleConfig(
            dp_config=_data_parallel(plan, half),
            tp_config=TransformerTensorParallelConfig(degree=p.tensor) if p.tensor > 1 else None,
            cp_config=TransformerContextParallelConfig.zig_zag(p.context) if p.context > 1 else None,
            autocast_precision=DType.bfloat16 if half and p.data == DataParallel.ddp else None,
            **options,
        ).build(model, device=device)
    assert isinstance(built, TransformerTrainModule)
    built.model.init_weights(
        max_seq_len=c.train.sequence_length,
        max_local_microbatch_size=c.train.microbatch * c.train.sequence_length,
        device=device,
        world_mesh=built.world_mesh,
    )
    return built


def build_data_loader(plan: Plan, data: TrainingData, module: AnyTrainModule) -> NumpyDataLoaderBase:
    """The training data in its seeded order.

    :raises UserError: if one epoch does not fill one batch.
    """
    c = plan.config
    loader = NumpyDataLoaderConfig(
        global_batch_size=c.train.tokens_per_step,
        seed=c.train.seed,
        work_dir=c.data.work_dir,
        num_workers=c.data.num_workers,
    ).build(data.train.build(), dp_process_group=module.dp_process_group)
    if loader.total_batches == 0:
        raise UserError(
            "train.global_batch_size",
            f"a batch that the training data fills ({len(loader.dataset)} sequences of {c.train.sequence_length} tokens)",
            c.train.global_batch_size,
        )
    return loader


def peak_flops(device: torch.device) -> int | None:
    """Dense bf16 FLOP/s of the device, for MFU; OLMo-core's table lacks the H200 (an H100 with more memory)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("H200", "H100").replace("GH100", "H100")
    return get_device_peak_flops_per_second(name, using_half_precision=True)


def build_trainer(plan: Plan, data: TrainingData, module: AnyTrainModule, loader: Any) -> Trainer:
    """The trainer with all its callbacks."""
    c = plan.config
    remote = is_url(c.save_folder)
    callbacks: dict[str, Callback] = {
        "progress": ProgressCallback(
            metrics_log_interval=c.logging.interval,
            devices=plan.world_size,
            folder=c.log_folder,
        ),
        "checkpointer": TimedCheckpointer(
            save_interval=c.checkpoint.interval,
            ephemeral_save_interval=c.checkpoint.ephemeral_interval,
            pre_train_checkpoint=False,
            save_async=c.checkpoint.save_async,
            # In a folder they are removed by the callback below, which tells by what each checkpoint says of itself.
            max_checkpoints=c.checkpoint.keep if remote else None,
            remove=CheckpointRemovalStrategy.ephemeral_only if remote else CheckpointRemovalStrategy.never,
        ),
        "config_saver": ConfigSaverCallback(save_data_paths=True),
        "seal": SealCallback(keep=c.checkpoint.keep),
        "composition": CompositionCallback(folder=c.log_folder, drawn=data.drawn, labels=data.labels),
        "signals": SignalCallback(),
        "speed": SpeedCallback(device_peak_flops_per_second=peak_flops(module.device)),
    }
    if isinstance(module.optim, SkipStepOptimizer):
        callbacks["skip_step"] = SkipStepCallback()
    if plan.world_size > 1 and c.parallel.hang_timeout is not None:
        callbacks["heartbeat"] = HeartbeatCallback(timeout=c.parallel.hang_timeout)
    if module.device.type == "cuda":
        callbacks["gpu_memory"] = GPUMemoryMonitorCallback()
    if data.validation is not None and (c.eval.interval is not None or c.eval.on_start or c.eval.on_finish):
        callbacks["validation"] = ValidationConfig(
            data.validation, c.eval.interval, c.eval.on_start, c.eval.on_finish, c.eval.max_batches
        )
    if c.logging.layers_interval is not None:
        callbacks["layers"] = LayersCallback(model=section_of(plan.transformer), interval=c.logging.layers_interval)
    if c.logging.wandb.enabled:
        w = c.logging.wandb
        callbacks["wandb"] = WandB(
            name=c.name,
            project=w.project,
            entity=w.entity,
            group=w.group,
            tags=w.tags,
            cancel_check_interval=None if wandb_needs_key() else 10**9,
        )
    trainer = TrainerConfig(
        save_folder=c.save_folder,
        work_dir=str(Path(c.data.work_dir) / "trainer"),
        checkpointer=CheckpointerConfig(save_overwrite=True),
        save_overwrite=True,
        max_duration=Duration.steps(plan.steps) if c.train.max_tokens is None else Duration.tokens(c.train.max_tokens),
        metrics_collect_interval=c.logging.interval,
        cancel_check_interval=1 if plan.world_size == 1 else 5,
        callbacks=callbacks,
    ).build(module, loader)
    trainer.checkpointer = OwnCheckpointer(**vars(trainer.checkpointer))
    saver = trainer.callbacks["config_saver"]
    assert isinstance(saver, ConfigSaverCallback)
    saver.config = json.loads(json.dumps(to_dict(c)))
    return trainer
