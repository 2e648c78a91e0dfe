"""Downstream tasks while a model trains, through OLMo-core's evaluator callback.

``eval.downstream: {tasks: [hellaswag, arc_easy], interval: 1000, limit: 500}`` in a run's configuration. Figures go where the
run's other figures go (metrics.jsonl, W&B) as ``eval/downstream/<task>/accuracy``, ``.../standard_error`` and
``.../bits_per_byte`` (of the right answers). Prompts longer than the training sequences are cut from the left, as OLMo-core's
own in-loop tasks are.
"""

import logging
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
from moda.errors import UserError
from moda.train.plan import Plan
from moda.train.validation import TimedEvaluator

from .downstream import answers, fit, summarise
from .model import TextTokenizer
from .scoring import Scores, Span, plan_batches
from .shared_prefix import Tree, lay_out
from .tasks import Question, Task, load_questions, resolve_tasks

log = logging.getLogger(__name__)

FIGURES = ("accuracy", "standard_error", "bits_per_byte")


def check_downstream(config: RunConfig) -> None:
    """Refuse unknown tasks before anything is built.

    :raises UserError: naming the nearest known task.
    """
    section = config.eval.downstream
    if section is None:
        return
    for key in ("tensor", "context", "pipeline"):
        if getattr(config.parallel, key) > 1:
            expected = f"parallel.{key}: 1 (its ranks have no whole logits)"
            raise UserError("eval.downstream", expected, getattr(config.parallel, key))
    resolve_tasks(section.tasks, "eval.downstream.tasks")


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
        self.task, self.questions, self.spans, self.group = task, questions, spans, group
        self.flat = [s for q in spans for s in q]
        planned = plan_batches([len(s.ids) for s in self.flat], batch_tokens)
        rank, ranks = get_rank(group), get_world_size(group)
        # A rank that has no batch left repeats the first one: under FSDP all ranks run the same number of times.
        own = [planned[i if i < len(planned) else 0] for i in range(rank, -(-len(planned) // ranks) * ranks, ranks)]
        ids = [lay_out([Tree(self.flat[i].ids, ((),)) for i in indices]).ids for indices in own]
        batches = [{"input_ids": x, "index": torch.tensor(indices)} for x, indices in zip(ids, own)]
        super().__init__(name="downstream", batches=batches, device=device)
        self._sums: dict[int, float] = {}

    @property
    def display_name(self) -> str:
        return f"downstream {self.task.name}"

    def update_metrics(self, batch: dict[str, Any], ce_loss: torch.Tensor | None, logits: torch.Tensor | None) -> None:
        """Note the log-likelihoods of the batch just run."""
        del ce_loss
        if logits is None:
            expected = "a model that gives whole logits (no tensor, context or pipeline parallelism)"
            raise UserError("eval.downstream", expected, "none")
        for row, i in enumerate(batch["index"].tolist()):
            span = self.flat[i]
            chosen = logits[row, span.start : span.start + len(span.targets)].float()
            targets = torch.tensor(span.targets, device=chosen.device)
            self._sums[i] = -F.cross_entropy(chosen, targets, reduction="sum").item()

    def compute_metrics(self) -> dict[str, torch.Tensor]:
        """The task's figures over all ranks."""
        sums = self._sums
        if get_world_size(self.group) > 1:
            parts: list[dict[int, float]] = [{}] * get_world_size(self.group)
            dist.all_gather_object(parts, sums, group=self.group)
            sums = {k: v for part in parts for k, v in part.items()}
        scores = Scores([np.asarray([sums[i]]) for i in range(len(self.flat))], 0, 0, 0.0)
        result = summarise(self.task, answers(self.questions, self.spans, scores))
        figures = {name: float("nan") if result[name] is None else float(result[name]) for name in FIGURES}
        accuracy, error = 100 * figures["accuracy"], 100 * figures["standard_error"]
        log.info("downstream %s: %.1f ± %.1f %% of %d questions", self.task.name, accuracy, error, result["n"])
        return {f"{self.task.name}/{name}": torch.tensor(figure) for name, figure in figures.items()}

    def reset_metrics(self) -> None:
        self._sums = {}


def _evaluator(task: Task, tokenizer: TextTokenizer, config: RunConfig, trainer: Trainer) -> TaskEvaluator:
    assert config.eval.downstream is not None
    length = config.train.sequence_length
    log.info("downstream %s: tokenizing questions", task.name)
    questions = load_questions(task, tokenizer, config.eval.downstream.limit)
    spans, cut = fit(task, questions, length, truncate=True)
    if cut:
        log.warning("%s: %d prompts are longer than %d tokens and lose their beginning", task.name, cut, length)
    options: dict[str, Any] = {"device": trainer.device, "group": trainer.dp_process_group}
    return TaskEvaluator(task, questions, spans, batch_tokens=config.train.microbatch * length, **options)


def downstream_callbacks(plan: Plan, trainer: Trainer) -> dict[str, Callback]:
    """What a training script hands to :func:`moda.train.train`; empty where ``eval.downstream`` is not set."""
    config = plan.config.eval
    if config.downstream is None:
        return {}
    tokenizer = TextTokenizer(plan.tokenizer)
    tasks = resolve_tasks(config.downstream.tasks, "eval.downstream.tasks")
    return {
        "downstream": TimedEvaluator(
            evaluators=[_evaluator(task, tokenizer, plan.config, trainer) for task in tasks],
            eval_interval=config.downstream.interval,
            eval_on_startup=config.on_start,
            eval_on_finish=config.on_finish,
            eval_duration=Duration.epochs(1),
            log_interval=1,
        )
    }
