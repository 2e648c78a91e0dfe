"""Downstream tasks: a task is an instance of a :class:`Task`, in a file beside this one and with a line in ``TASKS``."""

from collections.abc import Sequence

from moda.errors import UserError, nearest

from ..model import TextTokenizer
from .base import METRICS, Choice, Question, Task
from .jsonl import JsonlTask
from .olmo_eval import MMLU, TABLE_4, OlmoEvalTask

__all__ = [
    "DEFAULT_TASKS", "METRICS", "PAPER_TASKS", "TASKS", "Choice", "JsonlTask", "OlmoEvalTask", "Question", "Task",
    "load_questions", "resolve_tasks",
]  # fmt: skip

#: Every task by name, in the order of tables. This is where a new one is registered.
TASKS: dict[str, Task] = {task.name: task for task in (*TABLE_4, *MMLU)}
PAPER_TASKS = tuple(task.name for task in TABLE_4)
#: What ``--suite downstream`` runs.
DEFAULT_TASKS = (*PAPER_TASKS, "mmlu")


def resolve_tasks(names: Sequence[str], key: str = "--tasks") -> list[Task]:
    """Tasks by name, once each, in the order given.

    :param key: the option that an error is about.

    :raises UserError: for an unknown name, with the nearest known ones.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(key, "known tasks", name, nearest(name, TASKS))
    return [TASKS[name] for name in dict.fromkeys(names)]


def load_questions(task: Task, tokenizer: TextTokenizer, limit: int | None = None) -> list[Question]:
    """The questions of a task, in the order of the data.

    :param limit: only the first so many, shared evenly among the parts of a task that has several.
    """
    return task.questions(tokenizer, limit)
