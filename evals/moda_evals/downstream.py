"""Accuracy on multiple-choice questions, with the metric that OLMo2's runs used for each task."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moda.errors import UserError
from moda.progress import Report

from .model import ScoredModel
from .scoring import Scores, Span, continuation, score
from .tasks import Question, Task, load_questions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A model's scores of one question's choices.

    :param log_likelihoods: sum of the log-probabilities of each choice's tokens.
    """

    question: Question
    log_likelihoods: tuple[float, ...]

    @property
    def per_character(self) -> tuple[float, ...]:
        return tuple(x / c.characters for x, c in zip(self.log_likelihoods, self.question.choices))

    def prediction(self, metric: str) -> int:
        """The preferred choice; the first of equal ones."""
        scores = self.per_character if metric == "len_norm" else self.log_likelihoods
        return max(range(len(scores)), key=lambda i: (scores[i], -i))

    def is_right(self, metric: str) -> bool:
        return self.prediction(metric) == self.question.label

    @property
    def bits_per_byte(self) -> float:
        """Of the right answer."""
        label = self.question.label
        return -self.log_likelihoods[label] / (math.log(2) * self.question.choices[label].n_bytes)


def standard_error(correct: Sequence[bool]) -> float | None:
    """Of a mean of zeros and ones: ``sqrt(p (1 - p) / (n - 1))``; None for fewer than two."""
    n = len(correct)
    p = sum(correct) / n if n else 0.0
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def fit(task: Task, questions: Sequence[Question], context_length: int, truncate: bool) -> tuple[list[list[Span]], int]:
    """The spans to score for each question, and how many of them had to be cut.

    A request needs its context and all tokens but the last. One longer than the model's context loses its beginning if
    ``truncate``; its continuation is never cut.

    :raises UserError: for a request that does not fit, unless ``truncate``.
    """
    spans: list[list[Span]] = []
    cut, longest = 0, 0
    for question in questions:
        spans.append([])
        for choice in question.choices:
            context, need = choice.context, len(choice.context) + len(choice.tokens) - 1
            longest = max(longest, need)
            if need > context_length:
                cut += 1
                keep = context_length - len(choice.tokens) + 1
                if keep < 1:
                    expected = f"answers shorter than the model's context of {context_length} tokens"
                    raise UserError(task.name, expected, f"{question.id} with {len(choice.tokens)} tokens")
                context = context[-keep:]
            spans[-1].append(continuation(context, choice.tokens))
    if cut and not truncate:
        expected = f"prompts that fit the model's context of {context_length} tokens"
        hint = "--truncate cuts them from the left, --context-length N allows more"
        raise UserError(task.name, expected, f"{cut} longer ones, the longest with {longest} tokens", hint)
    return spans, cut


def answers(questions: Sequence[Question], spans: Sequence[Sequence[Span]], scores: Scores) -> list[Answer]:
    """Bring the scores of a flat list of spans back to their questions."""
    flat = iter(scores.log_probs)
    return [Answer(q, tuple(float(next(flat).sum(dtype="float64")) for _ in s)) for q, s in zip(questions, spans)]


def summarise(task: Task, answered: Sequence[Answer]) -> dict[str, Any]:
    """The figures of a task. Accuracies are fractions; ``correct`` has one digit per question."""
    right = [a.is_right(task.metric) for a in answered]
    n = len(right)
    return {
        "title": task.title,
        "metric": task.metric,
        "about": task.about,
        "source": task.source(),
        "n": n,
        "accuracy": sum(right) / n,
        "standard_error": standard_error(right),
        "accuracy_raw": sum(a.is_right("acc") for a in answered) / n,
        "accuracy_per_character": sum(a.is_right("len_norm") for a in answered) / n,
        "bits_per_byte": sum(a.bits_per_byte for a in answered) / n,
        "correct": "".join("1" if r else "0" for r in right),
    }


def evaluate_task(
    model: ScoredModel,
    task: Task,
    *,
    limit: int | None = None,
    batch_tokens: int | None = None,
    truncate: bool = False,
    per_example: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Run a task on a model.

    :param limit: only the first so many questions.
    :param batch_tokens: tokens in a batch; by the device if None.
    :param truncate: cut prompts that are longer than the model's context instead of refusing them.
    :param per_example: add every question's scores.

    :returns: :func:`summarise`'s figures, with ``truncated``, ``tokens``, ``padding`` and ``seconds``.
    """
    log.info("%s: tokenizing questions", task.title)
    questions = load_questions(task, model.tokenizer, limit)
    spans, cut = fit(task, questions, model.context_length, truncate)
    scores = score(model, [s for q in spans for s in q], batch_tokens=batch_tokens, progress=progress)
    answered = answers(questions, spans, scores)
    costs = {"tokens": scores.tokens, "padding": scores.padded / max(1, scores.tokens), "seconds": scores.seconds}
    result = {**summarise(task, answered), "truncated": cut, **costs}
    if per_example:
        result["examples"] = [
            {
                "id": a.question.id,
                "label": a.question.label,
                "prediction": a.prediction(task.metric),
                "log_likelihoods": list(a.log_likelihoods),
                "characters": [c.characters for c in a.question.choices],
            }
            for a in answered
        ]
    return result
