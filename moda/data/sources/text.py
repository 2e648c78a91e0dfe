"""``data.text``: small text, tokenized at the first start of a run.

For corpora of many gigabytes there is ``scripts/prepare_data.py``; this is for a folder of text or the demo.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moda.data.manifest import MANIFEST, read_manifest
from moda.data.mixture import Drawn
from moda.data.text import Document, holdout_share, read_documents
from moda.data.token_files import token_dtype
from moda.data.tokenizer import Tokenizer, encode_batch, load_encoder
from moda.errors import UserError
from moda.files import write_json, writing
from moda.progress import Report, TaskProgress

from .base import DataSource, Request, Selection

log = logging.getLogger(__name__)

FORMAT = 2  # of what is written; part of the folder's name
_BATCH = 64  # documents given to the tokenizer at a time


def split(documents: list[Document], fraction: float) -> dict[str, list[Document]]:
    """Train and validation documents, as :func:`moda.data.text.is_held_out` decides. Both have at least one.

    Where none would be held out, that with the smallest share is; where all would be, that with the largest is not. Of a
    single document the end is held out.
    """
    shares = sorted({holdout_share(d.text) for d in documents})
    if len(shares) == 1:
        only = documents[0]
        cut = max(1, int(len(only.text) * (1 - fraction)))
        log.warning("one document only: the last %.0f %% of its characters are held out for validation", 100 * fraction)
        parts = {"train": only.text[:cut], "validation": only.text[cut:]}
        return {name: [Document(only.label, only.id, text)] for name, text in parts.items()}
    bound = shares[1] if shares[0] >= fraction else min(fraction, shares[-1])
    held_out = [holdout_share(d.text) < bound for d in documents]
    return {
        "train": [d for d, out in zip(documents, held_out) if not out],
        "validation": [d for d, out in zip(documents, held_out) if out],
    }


def _write_tokens(
    documents: list[Document], folder: Path, tokenizer: Tokenizer, report: Report
) -> dict[str, dict[str, int]]:
    """One file of tokens per label, every document ended by eos; what each holds."""
    encoder, config = load_encoder(tokenizer.location), tokenizer.config
    dtype = token_dtype(config.vocab_size)
    summary: dict[str, dict[str, int]] = {}
    done = 0
    for label in sorted({d.label for d in documents}):
        chosen = [d for d in documents if d.label == label]
        counts: Counter[str] = Counter(documents=len(chosen), bytes=sum(len(d.text.encode()) for d in chosen))
        with writing(folder / f"{label}.npy", "wb") as f:
            for i in range(0, len(chosen), _BATCH):
                for ids in encode_batch(encoder, [d.text for d in chosen[i : i + _BATCH]]):
                    tokens = np.asarray([*ids, config.eos_token_id])
                    if tokens.max() >= config.vocab_size:
                        expected = f"more than the largest token id {tokens.max()}"
                        raise UserError("data.tokenizer.vocab_size", expected, config.vocab_size)
                    f.write(tokens.astype(dtype).tobytes())
                    counts["tokens"] += len(tokens)
                    done += 1
                report(done, len(documents))
        summary[label] = dict(counts)
    return summary


def _build(documents: list[Document], folder: Path, tokenizer: Tokenizer, fraction: float) -> None:
    log.info("tokenizing %d documents with %s ...", len(documents), tokenizer.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        dtype = str(token_dtype(tokenizer.config.vocab_size))
        manifest: dict[str, Any] = {"tokenizer": tokenizer.describe(), "dtype": dtype}
        with TaskProgress("tokenizing") as bar:
            for name, part in split(documents, fraction).items():
                with bar.measure(f"{name} ({len(part):,} documents)") as report:
                    manifest[name] = _write_tokens(part, scratch / name, tokenizer, report)
        write_json(scratch / MANIFEST, manifest)
        try:
            scratch.replace(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # otherwise another process made the same files first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Text(DataSource):
    """Text, tokenized once: the next run with the same text, tokenizer and split finds the result.

    The files appear complete or not at all.
    """

    name = "text"

    def select(self, request: Request) -> Selection:
        data, tokenizer = request.data, request.tokenizer
        sources = [data.text] if isinstance(data.text, str) else list(data.text or [])
        documents = list(read_documents(sources))
        if not documents:
            raise UserError("data.text", "at least one document that is not empty", ", ".join(sources))
        key = hashlib.sha256(json.dumps([FORMAT, tokenizer.describe(), data.validation_fraction]).encode())
        for d in documents:
            key.update(json.dumps([d.label, d.id, d.text]).encode())
        folder = Path(data.work_dir) / f"text-{key.hexdigest()[:16]}"
        if not (folder / MANIFEST).is_file():
            _build(documents, folder, tokenizer, data.validation_fraction)
        manifest = read_manifest(folder / MANIFEST)
        labels = list(manifest["train"])
        paths = [str(folder / "train" / f"{label}.npy") for label in labels]
        request.check("data.text", paths)
        validation = {label: [str(folder / "validation" / f"{label}.npy")] for label in manifest["validation"]}
        return replace(Selection.whole(paths, labels, request.dtype.itemsize), validation=validation)

    def preview(self, request: Request) -> list[Drawn]:
        """Nothing: the text is not tokenized yet."""
        return []
