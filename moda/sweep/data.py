"""The data of a sweep: a prepared folder for every run, and a look at whether what runs read is there."""

import json
from collections.abc import Sequence
from pathlib import Path

from moda.data import load_tokenizer
from moda.data.manifest import MANIFEST, read_manifest
from moda.data.sources import preview
from moda.errors import UserError

from .match import tokens_of
from .spec import Cell


def prepared(folder: str) -> list[str]:
    """Overrides that make a run train, and validate by source, on a folder that ``moda prepare`` made.

    :raises UserError: for a folder that is none.
    """
    root = Path(folder)
    if not (root / MANIFEST).is_file():
        raise UserError("--data", f"a folder that moda prepare made (with {MANIFEST})", folder)
    manifest = read_manifest(root / MANIFEST)
    validation: dict[str, list[str]] = {}
    for name, entry in manifest["shards"].items():
        if entry.get("split") == "validation":
            validation.setdefault(entry["source"], []).append(str(root / name))
    others = [f"data.{key}=null" for key in ("mix", "mixture", "text", "source", "base_dir", "mix_tokens")]
    return [
        *others,
        f"data.paths={json.dumps([str(root / 'train' / '*.npy')])}",
        f"data.validation={json.dumps(validation) if validation else 'null'}",
        f"data.tokenizer={manifest['tokenizer'].get('name', '')}",
    ]


def missing_data(cells: Sequence[Cell]) -> UserError | None:
    """What is wrong with the data of these runs, or None. Remote files are not asked for."""
    looked_at = []
    for cell in cells:
        data, train = cell.config.data, cell.config.train
        if data in looked_at:
            continue
        looked_at.append(data)
        assert not isinstance(data.tokenizer, str)
        try:
            preview(
                data,
                load_tokenizer(data.tokenizer),
                train.sequence_length,
                tokens_of(cell.config),
                train.tokens_per_step,
            )
        except UserError as e:
            return e
    return None
