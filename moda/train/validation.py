"""Validation in the training loop: every set by itself, to its last document, whatever the number of ranks."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from olmo_core.data import DataCollator, NumpyDatasetConfig, NumpyPaddedFSLDataset, TextDataLoaderBase
from olmo_core.distributed.utils import all_reduce_value, get_rank, get_world_size
from olmo_core.eval import Evaluator, LMEvaluator
from olmo_core.train import Trainer
from olmo_core.train.callbacks import Callback, CallbackConfig, EvaluatorCallback

from .callbacks import between_steps
from .progress import ProgressCallback

log = logging.getLogger(__name__)


class TimedEvaluator(EvaluatorCallback):
    """OLMo-core's evaluator, whose time is not counted as a training step's, and which at the end of a run leaves out what it
    has just done, and everything if the run was asked to stop."""

    _evaluated_at: int | None = None

    def post_attach(self) -> None:
        """OLMo-core lets some train modules evaluate. All of this project's can, a pipeline's too."""

    def perform_eval(self, prefix: str = "eval") -> None:
        head = cast(Any, self.trainer.train_module).model.lm_head
        if head is not None:  # a stage of a pipeline may have none
            head.logits_with_losses = not all(isinstance(e, NextTokenEvaluator) for e in self.evaluators)
        with between_steps(self.trainer):
            super().perform_eval(prefix)
        if head is not None:
            head.logits_with_losses = True
        self._evaluated_at = self.step

    def _log_progress(self, evaluator: Evaluator, eval_step: int) -> None:
        progress = self.trainer.callbacks["progress"]
        assert isinstance(progress, ProgressCallback)
        what = "validation" if isinstance(evaluator, NextTokenEvaluator) else f"evaluation ({evaluator.display_name})"
        progress.busy(what, eval_step, evaluator.total_batches or 0)

    def post_train(self) -> None:
        stopped = all_reduce_value(  # the ranks may learn of it at different times, and all must do the same here
            float(self.trainer.is_canceled), self.trainer.device, op=dist.ReduceOp.MAX
        )
        if not stopped and self._evaluated_at != self.step:
            super().post_train()


class NextTokenEvaluator(LMEvaluator):
    """OLMo-core's evaluator, counting predicted tokens only (``predicts`` of a batch): its own counts a document's last position
    too, as a loss of 0.

    :param model: the model, if its ranks may share a batch's positions.
    """

    def __init__(self, *, model: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's positions of ``[B, T]``."""
        if self.model is None:
            return x
        if self.model._cp_load_balancer is not None:
            x = self.model._cp_load_balancer.batch_shard(inputs=[x], seq_dims=[1])[0]
        mesh = self.model._tp_mesh
        return x if mesh is None else x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]

    def update_metrics(self, batch: dict[str, Any], ce_loss: torch.Tensor | None, logits: torch.Tensor | None) -> None:
        super().update_metrics({**batch, "label_mask": self._part(batch["predicts"])}, ce_loss, logits)


class ValidationBatches:
    """Batches of one rank, set after set. OLMo-core's loader mixes all sets and drops what does not fill a batch of all ranks.

    A set's last batch is filled up with documents that count nothing, so that all ranks run equally often.

    :param dataset: padded documents, with a ``label`` in each file's metadata.
    :param per_rank: documents in a rank's batch.
    :param limit: of each set at most so many batches, spread evenly over it; None for all of it.
    """

    def __init__(
        self,
        dataset: NumpyPaddedFSLDataset,
        collator: DataCollator,
        *,
        per_rank: int,
        rank: int,
        ranks: int,
        limit: int | None,
    ) -> None:
        self.dataset, self.collator = dataset, collator
        sets: dict[str, list[int]] = {}
        for metadata, (start, end) in zip(dataset.metadata, dataset.offsets):
            sets.setdefault(metadata["label"], []).extend(range(start, end))
        self._plan: list[list[int | None]] = []
        together = per_rank * ranks
        for documents in sets.values():
            most = len(documents) if limit is None else min(len(documents), limit * together)
            chosen: list[int | None] = [documents[i * len(documents) // most] for i in range(most)]
            chosen += [None] * (-most % together)
            for at in range(0, len(chosen), together):
                self._plan.append(chosen[at + rank * per_rank : at + (rank + 1) * per_rank])

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._plan:
            collated = self.collator([self._document(i) for i in batch])
            predicts = F.pad(collated["label_mask"][:, 1:], (0, 1), value=False)
            yield {**collated, "predicts": predicts}

    def _document(self, index: int | None) -> dict[str, Any]:
        item = dict(self.dataset[index or 0])
        if index is None:
            item["label_mask"] = torch.zeros_like(item["label_mask"])
        return item


@dataclass
class ValidationConfig(CallbackConfig):
    """Validation in the loop, built once its trainer is there.

    :param dataset: padded documents, with a ``label`` in each file's metadata.
    :param interval: in steps; None for none but those at start and finish.
    :param max_batches: of each set at most so many batches; None for all of it.
    """

    dataset: NumpyDatasetConfig
    interval: int | None
    on_start: bool
    on_finish: bool
    max_batches: int | None

    def build(self, trainer: Trainer) -> Callback:
        dataset, loader = self.dataset.build(), trainer.data_loader
        assert isinstance(dataset, NumpyPaddedFSLDataset) and isinstance(loader, TextDataLoaderBase)
        log.info("indexing the validation data; done once")
        dataset.prepare()
        group = trainer.dp_process_group
        batches = ValidationBatches(
            dataset, loader.collator, per_rank=trainer.train_module.eval_batch_spec.rank_batch_size // dataset.sequence_length,
            rank=get_rank(group), ranks=get_world_size(group), limit=self.max_batches,
        )  # fmt: skip
        labels = sorted({metadata["label"] for metadata in dataset.metadata})
        model = cast(Any, trainer.train_module).model
        evaluator = NextTokenEvaluator(model=model, name="lm", batches=batches, labels=labels, device=trainer.device)
        return TimedEvaluator(
            evaluators=[evaluator],
            eval_interval=self.interval,
            eval_on_startup=self.on_start,
            eval_on_finish=self.on_finish,
            log_interval=1,
        )
