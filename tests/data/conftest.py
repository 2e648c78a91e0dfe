"""Small corpora in every format, and one place to prepare them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")


@pytest.fixture
def documents() -> list[str]:
    """Documents of several lengths, with accents, blank lines and text that looks like a special token."""
    rng = random.Random(0)
    words = "the of and model depth attention naïve café 42 <|endoftext|> zero-shot layer token\tgap".split(" ")
    return [
        f"document {i}\n\n" + "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(rng.randint(1, 30)))
        for i in range(60)
    ]


@pytest.fixture
def prepared() -> Callable[..., Any]:
    """``prepared(output, sources, **options)``: a preparation in this process."""
    from moda.data.prepare import PrepareOptions, prepare
    from moda.typed import from_dict

    def run(
        output: Path, sources: dict[str, Any], restart: bool = False, overwrite: bool = False, **options: Any
    ) -> Any:
        given = {"output": str(output), "sources": sources, "tokenizer": "gpt-neox", "workers": 1, **options}
        return prepare(from_dict(PrepareOptions, given), restart=restart, overwrite=overwrite)

    return run
