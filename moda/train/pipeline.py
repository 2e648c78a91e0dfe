"""The train module of a pipeline: OLMo-core's, with stages that depth slots cross, tied embeddings and evaluation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from olmo_core.data.utils import split_batch
from olmo_core.distributed.parallel import PipelineScheduleType
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.nn.transformer import Transformer
from olmo_core.train.train_module import EvalBatchSpec
from olmo_core.train.train_module.transformer import (
    TransformerActivationCheckpointingConfig,
    TransformerDataParallelConfig,
    TransformerPipelineParallelConfig,
    TransformerPipelineTrainModule,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from moda.depth.mechanism import set_start
from moda.model.pipeline import Pipeline
from moda.model.stages import Stage, cut

__all__ = ["PipelineTrainModule"]


@dataclass
class _Stages(TransformerPipelineParallelConfig):
    """The stages of each rank, cut here; the schedule is :mod:`moda.model.pipeline`'s.

    :param checkpointing: applied before the cut, as OLMo-core takes the blocks of a model for numbered from 0.
    """

    stages: list[Stage] = field(default_factory=list)
    checkpointing: TransformerActivationCheckpointingConfig | None = None

    def split_model(self, model: Transformer, *, pp_mesh: Any, **_: Any) -> tuple[list[Any], list[Transformer]]:
        parts = []
        for stage in self.stages[pp_mesh.get_local_rank() :: self.degree]:
            parts.append(part := copy.deepcopy(model))
            if (ac := self.checkpointing) is not None:
                part.apply_activation_checkpointing(
                    ac.mode,
                    block_interval=ac.block_interval,
                    modules=ac.modules,
                    activation_memory_budget=ac.activation_memory_budget,
                )
            cut(part, stage)
        return [], parts


class PipelineTrainModule(TransformerPipelineTrainModule):
    """OLMo-core's pipeline train module with other stages and another schedule.

    Every rank is given the whole batch of its pipeline, and knows its losses. Weights begin as they do without a pipeline.

    :param model: the whole model, on the meta device.
    :param stages: of one pipeline, in order; stage i is on its rank i % R.
    :param kwargs: those of OLMo-core's module.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        stages: list[Stage],
        dp_config: TransformerDataParallelConfig,
        ac_config: TransformerActivationCheckpointingConfig | None,
        **kwargs: Any,
    ) -> None:
        schedule = PipelineScheduleType.single_1F1B
        super().__init__(
            model,
            pp_config=_Stages(degree=stages[0].ranks, schedule=schedule, stages=stages, checkpointing=ac_config),
            dp_config=dp_config,
            state_dict_load_opts=StateDictOptions(flatten_optimizer_state_dict=True, strict=True),
            **kwargs,
        )
        self._tied = model.tie_word_embeddings
        whole = copy.deepcopy(model)
        whole.init_weights(device=self.device)  # what one rank would draw; this rank's part of it stays
        self.load_weights(dict(whole.named_parameters(remove_duplicate=False)))
        del whole
        pipelines = self.world_mesh.mesh.flatten(1).T.tolist()  # ranks are laid out by stages first
        more = 1 if len(self.model_parts) == 1 else 3
        groups = [dist.new_subgroups_by_enumeration(pipelines, group_desc=f"pipeline_{i}")[0] for i in range(more)]
        half = dp_config.param_dtype
        dtype = model.dtype if half is None else half.as_pt()
        self.pipeline = Pipeline(self.model_parts, [self.pp_group, *groups], dtype)

    def load_weights(self, whole: dict[str, torch.Tensor]) -> None:
        """Take this rank's weights from those of the whole model."""
        for part in self.model_parts:
            for name, p in part.named_parameters():
                set_start(p, whole[name.replace("_checkpoint_wrapped_module.", "")])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optim in zip(self.model_parts, self.optimizers, strict=True):
            own = {name: state_dict["model"][name] for name in get_model_state_dict(part)}
            set_model_state_dict(part, own, options=self.state_dict_load_opts)
            if "optim" in state_dict:
                set_optimizer_state_dict(part, optim, state_dict["optim"], options=self.state_dict_load_opts)

    @property
    def model(self) -> Transformer:
        """The last of this rank's stages."""
        return self.model_parts[-1]

    @property
    def optim(self) -> Optimizer:
        """The optimizer of one of this rank's stages: all are alike."""
        return self.optimizers[0]

    @property
    def eval_batch_spec(self) -> EvalBatchSpec:
        return EvalBatchSpec(self.rank_microbatch_size, max_sequence_length=self.max_sequence_length)

    def pre_train(self) -> None:
        """The plan has checked the batch, and the schedule needs none of OLMo-core's preparations."""

    def run_pipeline(
        self, input_ids: torch.Tensor, labels: torch.Tensor, batch_num_tokens_for_loss: int | float, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and backward pass of a batch; its cross-entropy and z-loss, on every rank."""
        batch = {"input_ids": input_ids, "labels": labels}
        batch.update({k: kwargs.pop(k) for k in ("doc_lens", "max_doc_lens") if k in kwargs})
        microbatches = split_batch(batch, self.rank_microbatch_size // input_ids.shape[1])
        losses = self.pipeline.train(microbatches, loss_div_factor=batch_num_tokens_for_loss, **kwargs)
        if self._tied:
            self.pipeline.share_tied_gradient()
        total = torch.zeros(2, device=self.device)
        for _, _, ce, z in losses:
            assert ce is not None
            total += torch.stack([ce.detach(), torch.zeros_like(ce) if z is None else z.detach()])
        dist.broadcast(total, group=self.pp_group, group_src=self.pp_final_stage_rank)
        return total[0], None if self.z_loss_multiplier is None else total[1]

    def reduce_send_recv(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of a loss over the pipelines."""
        assert x is not None
        dist.all_reduce(x, group=self.dp_process_group)
        return x / self.dp_world_size

    def _clip_grad_norm(self, max_grad_norm: float, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Clip gradients by their norm over all stages, in which a tied embedding counts once."""
        if not (self._tied and self.pipeline.stages[-1].is_last):
            return super()._clip_grad_norm(max_grad_norm, *args, **kwargs)
        copied = cast(torch.nn.Parameter, self.model.embeddings.weight)
        grad, copied.grad = copied.grad, None
        norm = super()._clip_grad_norm(max_grad_norm, *args, **kwargs)
        copied.grad = grad
        torch.nn.utils.clip_grads_with_norm_([copied], max_grad_norm, norm)
        return norm

    def eval_batch(self, batch: dict[str, Any], labels: torch.Tensor | None = None) -> LMOutputWithLoss:
        """The cross-entropy ``[B, T]`` of each token, on every rank; no logits."""
        input_ids, labels, kwargs = self._prepare_batch(batch, labels)
        assert labels is not None
        for part in self.model_parts:
            part.eval()
        options = dict(ignore_index=self.label_ignore_index, loss_reduction="none", return_logits=False)
        out = self.pipeline.evaluate({"input_ids": input_ids, "labels": labels, **kwargs}, **options)
        for part in self.model_parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # a forward pass alone leaves a stage gathered
        if out is None:
            ce = torch.empty(input_ids.shape, device=self.device)
        else:
            ce = get_local_tensor(out.ce_loss).to(torch.float32).contiguous()
        dist.broadcast(ce, group=self.pp_group, group_src=self.pp_final_stage_rank)
        return LMOutputWithLoss(logits=None, loss=ce, ce_loss=ce, z_loss=None)
