"""Downstream tasks while a model trains, through OLMo-core's evaluator callback.

``eval.downstream: {tasks: [hellaswag, arc_easy], interval: 1000, limit: 500}`` in a run's configuration. Figures go where the
run's other figures go (metrics.jsonl, W&B) as ``eval/downstream/<task>/accuracy``, ``.../standard_error`` and
``.../bits_per_byte`` (of the right answers). Prompts longer than the training sequences are cut from the left, as OLMo-core's
own in-loop tasks are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.eval import Evaluator
from olmo_core.train import Duration, Trainer
from olmo_core.train.callbacks import Callback

from moda.config.schema import RunConfig
from moda.errors import UserError, nearest
from moda.train.plan import Plan
from moda.train.validation import TimedEvaluator

from .downstream import answers, fit, summarise
from .model import TextTokenizer
from .scoring import Scores, Span, plan_batches
from .tasks import TASKS, Question, Task, load_questions

__all__ = ["TaskEvaluator", "check_downstream", "downstream_callbacks"]

log = logging.getLogger(__name__)

FIGURES = ("accuracy", "standard_error", "bits_per_byte")


def check_downstream(config: RunConfig) -> None:
    """Refuse unknown tasks before anything is built.

    :raises UserError: naming the nearest known task.
    """
    section = config.eval.downstream
    if section is not None and config.parallel.tensor > 1:
        raise UserError(
            "eval.downstream", "parallel.tensor: 1 (its ranks have no whole logits)", config.parallel.tensor
        )
    for name in section.tasks if section is not None else ():
        if name not in TASKS:
            raise UserError("eval.downstream.tasks", "known tasks", name, nearest(name, TASKS))


class TaskEvaluator(Evaluator):
    """One task as OLMo-core's evaluator loop takes it: batches of similar length, the same number on every rank.

    :param batch_tokens: tokens in a rank's batch, padding included.
    """

    def __init__(
        self,
        task: Task,
        questions: list[Question],
        spans: list[list[Span]],
        *,
        batch_tokens: int,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(name="downstream", batches=[], device=device)
        self.task, self.questions, self.spans, self.group = task, questions, spans, group
        self.flat = [s for q in spans for s in q]
        planned = plan_batches([len(s.ids) for s in self.flat], batch_tokens)
        rank, ranks = get_rank(group), get_world_size(group)
        rounds = -(-len(planned) // ranks)
        # A rank that has no batch left repeats the first one: under FSDP all ranks run the same number of times.
        self.planned = [planned[i] if (i := r * ranks + rank) < len(planned) else planned[0] for r in range(rounds)]
        self._sums: dict[int, float] = {}
        self._current: list[int] = []

    @property
    def display_name(self) -> str:
        return f"downstream {self.task.name}"

    @property
    def total_batches(self) -> int:
        return len(self.planned)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.planned:
            self._current = batch
            width = max(len(self.flat[i].ids) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(self.flat[i].ids)] = torch.tensor(self.flat[i].ids)
            yield {"input_ids": ids}

    def update_metrics(self, batch: dict[str, Any], ce_loss: torch.Tensor | None, logits: torch.Tensor | None) -> None:
        """Note the log-likelihoods of the batch just run."""
        del batch, ce_loss
        if logits is None:
            raise UserError(
                "eval.downstream", "a model that gives whole logits (no tensor or context parallelism)", "none"
            )
        for row, i in enumerate(self._current):
            span = self.flat[i]
            picked = logits[row, span.start : span.start + len(span.targets)].float()
            targets = torch.tensor(span.targets, device=picked.device)
            self._sums[i] = -F.cross_entropy(picked, targets, reduction="sum").item()

    def compute_metrics(self) -> dict[str, torch.Tensor]:
        """The task's figures over all ranks."""
        sums = self._sums
        if get_world_size(self.group) > 1:
            parts: list[dict[int, float] | None] = [None] * get_world_size(self.group)
            dist.all_gather_object(parts, sums, group=self.group)
            sums = {k: v for part in parts if part is not None for k, v in part.items()}
        scores = Scores([np.asarray([sums[i]]) for i in range(len(self.flat))], 0, 0, 0.0)
        result = summarise(self.task, answers(self.questions, self.spans, scores))
        error = float("nan") if result["standard_error"] is None else result["standard_error"]
        log.info(
            "downstream %s: %.1f ± %.1f %% of %d questions",
            self.task.name,
            100 * result["accuracy"],
            100 * error,
            result["n"],
        )
        return {
            f"{self.task.name}/{figure}": torch.tensor(
                float("nan") if result[figure] is None else float(result[figure])
            )
            for figure in FIGURES
        }

    def reset_metrics(self) -> None:
        self._sums = {}


def _evaluators(plan: Plan, trainer: Trainer) -> Iterator[tuple[str, TaskEvaluator]]:
    config = plan.config
    section = config.eval.downstream
    assert section is not None
    tokenizer = TextTokenizer(plan.tokenizer)
    length = config.train.sequence_length
    for name in dict.fromkeys(section.tasks):
        task = TASKS[name]
        questions = load_questions(task, tokenizer, section.limit)
        spans, cut = fit(task, questions, length, truncate=True)
        if cut:
            log.warning("%s: %d prompts are longer than %d tokens and lose their beginning", name, cut, length)
        yield (
            name,
            TaskEvaluator(
                task,
                questions,
                spans,
                batch_tokens=config.train.microbatch_size * length,
                device=trainer.device,
                group=trainer.dp_process_group,
            ),
        )


def downstream_callbacks(plan: Plan, trainer: Trainer) -> dict[str, Callback]:
    """What a training script hands to :func:`moda.train.train`; empty where ``eval.downstream`` is not set."""
    config = plan.config.eval
    if config.downstream is None:
        return {}
    return {
        "downstream": TimedEvaluator(
            evaluators=[evaluator for _, evaluator in _evaluators(plan, trainer)],
            eval_interval=config.downstream.interval,
            eval_on_startup=config.on_start,
            eval_on_finish=config.on_finish,
            eval_duration=Duration.epochs(1),
            log_interval=50,
        )
    }
