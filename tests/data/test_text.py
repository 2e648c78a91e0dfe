"""Reading text: one way for training, preparation and evaluation, whatever the files look like."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moda.config.schema import DataConfig, TokenizerSection
from moda.data import build_training_data, load_tokenizer
from moda.data.formats import FORMATS, detect
from moda.data.sources.text import split
from moda.data.text import Document, holdout_share, is_held_out, read_documents
from moda.data.tokenizer import document_ids
from moda.errors import UserError
from tests.data_files import write_jsonl

ODD = "one\r\ntwo\u2028three\u0085four\rfive\x0b\x1c six\n"


def texts(*sources: Path) -> list[str]:
    return [d.text for d in read_documents([str(s) for s in sources])]


def tokens_of(folder: Path) -> list[int]:
    return [int(t) for f in sorted(folder.rglob("*.npy")) for t in np.fromfile(f, dtype=np.uint16)]


@pytest.mark.parametrize("kind", ["text", "jsonl", "lines"])
def test_newlines_stay_as_they_are_in_the_file(kind: str, tmp_path: Path, prepared: Any) -> None:
    """Training, preparation and evaluation read the same text; JSON lines end at a newline character only."""
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox"))
    path, source = tmp_path / "in" / f"a.{'jsonl' if kind == 'jsonl' else 'txt'}", {"format": "auto"}
    path.parent.mkdir()
    if kind == "text":
        path.write_bytes(ODD.encode())
    elif kind == "jsonl":
        path.write_bytes(json.dumps({"text": ODD}, ensure_ascii=False).encode() + b"\r\n")
    else:
        path.write_bytes(b"x\ry\r\n")
        source = {"format": "lines"}
    text = "x\ry" if kind == "lines" else ODD
    if kind != "lines":
        assert texts(path) == [ODD]
        data = DataConfig(text=[str(path.parent)], tokenizer="gpt-neox", work_dir=str(tmp_path / "work"))
        build_training_data(data, tokenizer, 8)
        cut = max(1, int(len(ODD) * 0.95))  # of a single document the end is held out
        assert tokens_of(tmp_path / "work") == document_ids(tokenizer, ODD[:cut]) + document_ids(tokenizer, ODD[cut:])
    done = prepared(tmp_path / "out", {"a": {"path": str(path), **source}}, validation_fraction=0.0)
    assert tokens_of(done.folder / "train") == document_ids(tokenizer, text)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n{"text": "three"}')
    assert texts(tmp_path) == ["one", "two", "three"]


def test_a_folder_reads_every_known_format_and_says_what_it_passes_over(tmp_path: Path, caplog: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    line = b'{"text": "%s"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line % b"gz"))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(line % b"xz"))
    (tmp_path / "c.txt.bz2").write_bytes(bz2.compress(b"bz2"))
    (tmp_path / "d.ndjson.zst").write_bytes(zstandard.compress(line % b"zst"))
    pq.write_table(pa.table({"text": ["parquet"], "n": [1]}), tmp_path / "e.parquet")
    (tmp_path / "f.md").write_text("plain")
    (tmp_path / "part-00000").write_bytes(line % b"no suffix")
    for name in (".hidden.txt", ".ipynb_checkpoints/a.txt", ".git/x.py", "sub/.DS_Store", "photo.png", "notes.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not this")
    with caplog.at_level(logging.INFO, "moda"):
        assert texts(tmp_path) == ["gz", "xz", "bz2", "zst", "parquet", "plain", "no suffix"]
    (message,) = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    for part in ("7 files", "2 hidden files", "2 hidden folders", "1 .png", "1 .docx"):
        assert part in message, message


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "a.txt", "a.json", "a", "a.gz", "packed.jsonl"])
def test_json_lines_under_another_name(name: str, tmp_path: Path, prepared: Any) -> None:
    data = b'{"url": "u", "text": "one"}\n{"url": "u", "text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") or "packed" in name else data)
    assert texts(tmp_path / name) == texts(tmp_path) == ["one", "two"]
    done = prepared(tmp_path / "out", {"a": str(tmp_path / name)}, validation_fraction=0.0)
    assert done.manifest["sources"]["a"]["documents"] == 2


@pytest.mark.parametrize(
    "head, format",
    [
        ('{"text": "' + "long " * 20_000 + '"}\n{"text": "b"}\n', "jsonl"),
        ('{"id": 1, "text": "a"}', "jsonl"),
        ('{"a": 1}\n{"b": 2}\n', "jsonl"),  # refused when it is read: no field `text`
        ('{"text": "cut sho\n{"text": "b"}\n', "jsonl"),
        ('{\n  "text": "pretty"\n}\n', "text"),
        ('{"name": "a package"}', "text"),
        ("{curly} text\n{more}\n", "text"),
        ("", "text"),
    ],
)
def test_what_looks_like_json_lines(head: str, format: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(head)
    found = detect(str(tmp_path / "a.json"))
    assert found is FORMATS[format]


DAMAGED = {
    "a lone surrogate": (rb'{"text": "a \ud800 b"}', "UTF-8 can hold"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "UTF-8 text"),
    "a long integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a JSON object"),
    "deep nesting": (b'{"text": "a", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "a list": (b'["text"]', "found list"),
    "no field": (b'{"body": "a"}', "the field 'text'.*found body"),
    "a number": (b'{"text": 5}', "a string in the field 'text'.*found int"),
    "null": (b'{"text": null}', "a string in the field 'text'.*found NoneType"),
    "cut short": (b'{"text": "a', "a JSON object"),
}


@pytest.mark.parametrize("kind", list(DAMAGED))
def test_damaged_records_are_one_error_that_names_file_and_line(kind: str, tmp_path: Path, prepared: Any) -> None:
    line, message = DAMAGED[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        texts(path)
    assert f"{path}, line 3" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path / "out", {"a": str(path)})
    assert f"{path}, line 3" in str(caught.value) and "=skip leaves it out" in str(caught.value)


def test_a_path_with_brackets_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "text [v2]"
    folder.mkdir()
    write_jsonl(folder / "a [1].jsonl", ["one"])
    assert texts(folder) == texts(folder / "a [1].jsonl") == ["one"]


def test_nothing_of_a_known_format(tmp_path: Path, prepared: Any) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    for read in (lambda: texts(tmp_path), lambda: prepared(tmp_path / "out", {"a": str(tmp_path)})):
        with pytest.raises(UserError, match="a known format .*parquet, jsonl, text"):
            read()
    with pytest.raises(UserError, match="one of auto, parquet, jsonl, text.*did you mean 'jsonl'"):
        prepared(tmp_path / "out", {"a": {"path": str(tmp_path), "format": "json"}})


def test_documents_have_stable_ids(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("three")
    assert [d.id for d in read_documents([str(tmp_path)])] == ["a.jsonl, line 1", "a.jsonl, line 2", "sub/b.txt"]


def test_one_hold_out_rule(tmp_path: Path, prepared: Any) -> None:
    """The hash of the text decides, in ``data.text`` and in a preparation, wherever the text lies."""
    documents = [f"document {i}" for i in range(40)] + ["document 3"]
    held_out = {d for d in documents if int.from_bytes(hashlib.sha256(d.encode()).digest()[:8], "big") / 2**64 < 0.2}
    assert held_out and {d for d in documents if is_held_out(d, 0.2)} == held_out
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox"))
    want = [t for d in documents if d in held_out for t in document_ids(tokenizer, d)]
    done = prepared(tmp_path / "out", {"a": str(path)}, validation_fraction=0.2)
    assert tokens_of(done.folder / "validation") == want
    data = DataConfig(text=[str(path)], tokenizer="gpt-neox", work_dir=str(tmp_path / "work"), validation_fraction=0.2)
    found = build_training_data(data, tokenizer, 8)
    assert found.validation is not None and found.validation.paths is not None
    assert np.fromfile(str(found.validation.paths[0]), dtype=np.uint16).tolist() == want


def test_both_sides_have_a_document() -> None:
    documents = [Document("a", str(i), f"document {i}") for i in range(5)]
    ordered = sorted(documents, key=lambda d: holdout_share(d.text))
    assert split(documents, 1e-9)["validation"] == ordered[:1]
    assert split(documents, 1 - 1e-9)["train"] == ordered[-1:]
    same = split([documents[0]] * 3, 0.1)
    assert same["train"][0].text + same["validation"][0].text == documents[0].text


def test_documents_have_no_special_tokens_but_their_end(tmp_path: Path) -> None:
    """Whatever a tokenizer's post-processor would add, and whatever a text looks like."""
    import tokenizers

    from tests.tiny import make_tokenizer

    file = make_tokenizer(tmp_path / "tokenizer.json")
    loaded = tokenizers.Tokenizer.from_file(str(file))
    loaded.add_special_tokens(["<s>"])
    loaded.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", loaded.token_to_id("<s>"))]
    )
    loaded.decoder = tokenizers.decoders.ByteLevel()
    loaded.save(str(file))
    tokenizer = load_tokenizer(TokenizerSection(str(file)))
    eos, bos = tokenizer.config.eos_token_id, loaded.token_to_id("<s>")
    text = "a <|endoftext|> b"
    ids = document_ids(tokenizer, text)
    assert ids[-1] == eos and eos not in ids[:-1] and bos not in ids
    assert loaded.decode(ids[:-1]) == text and tokenizer.load().encode(text).ids[0] == bos


def test_brackets_in_a_path_that_exists_are_no_glob(tmp_path: Path) -> None:
    folder = tmp_path / "runs [old]" / "a"
    folder.mkdir(parents=True)
    for name in ("1.txt", "2.txt", "[x].txt"):
        (folder / name).write_text(name)
    assert texts(folder) == texts(folder / "*.txt") == ["1.txt", "2.txt", "[x].txt"]
    assert texts(folder / "[x].txt") == ["[x].txt"] and texts(folder / "[12].txt") == ["1.txt", "2.txt"]
    assert texts(tmp_path / "runs [old]" / "**" / "[1].txt") == ["1.txt"]
