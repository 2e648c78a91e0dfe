"""Questions of one's own: a file with one JSON object per line.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "label": 0}

``label`` counts from 0. A choice is scored as it stands, its leading space included.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moda.errors import UserError

from ..model import TextTokenizer
from .base import Choice, Question, Task


@dataclass(frozen=True)
class JsonlTask(Task):
    """A task whose questions are the lines of ``path``."""

    path: Path

    def questions(self, tokenizer: TextTokenizer, limit: int | None) -> list[Question]:
        """See :meth:`Task.questions`.

        :raises UserError: for a file that is missing, or a line that is no question.
        """
        lines = [(number, line) for number, line in enumerate(self._read().split(b"\n"), 1) if line.strip()]
        if not lines:
            raise UserError(self.name, f"at least one question in {self.path}", "none")
        return [self._question(tokenizer, number, line) for number, line in lines[:limit]]

    def source(self) -> str:
        return hashlib.sha256(self._read()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "path": str(self.path), "sha256": self.source()}

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as e:
            raise UserError(self.name, f"a readable file {self.path}", hint=e.strerror) from None

    def _question(self, tokenizer: TextTokenizer, number: int, line: bytes) -> Question:
        try:
            row = json.loads(line)
            context, texts, label = row["context"], row["choices"], row["label"]
            if not (context and all(texts) and type(label) is int and 0 <= label < len(texts)):
                raise ValueError("an empty text, or a label that is none of the choices")
            ids = tuple(tokenizer.encode(context))
            choices = [Choice(ids, tuple(tokenizer.encode(t)), len(t), len(t.encode())) for t in texts]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            expected = f"an object with context, choices and label in {self.path}, line {number}"
            raise UserError(self.name, expected, line[:60].decode(errors="replace"), str(e)[:100]) from None
        return Question(f"{self.path.stem}/{number}", tuple(choices), label)
