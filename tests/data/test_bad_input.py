"""What a preparation does with input that is broken: an error that names the place, or a counted skip; output stays whole."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moda.errors import UserError
from tests.data_files import tree, write_jsonl

GOOD = json.dumps({"text": "a good document"}).encode() + b"\n"
BAD = {
    "invalid_utf8": b'{"text": "caf\xe9"}\n',
    "invalid_json": b'{"text": "cut sho\n',
    "missing_field": b'{"body": "elsewhere"}\n',
    "empty": b'{"text": "  \\n"}\n',
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_records(kind: str, tmp_path: Path, prepared: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 2 + BAD[kind] + GOOD * 3)
    with pytest.raises(UserError, match=r"a\.jsonl, line 3.*=skip leaves it out"):
        prepared(tmp_path / "out", {"a": str(path)}, empty="error")
    assert not (tmp_path / "out").exists()
    skipping = {"bad_input": "skip", "empty": "skip", "validation_fraction": 0.0}
    done = prepared(tmp_path / "out", {"a": str(path)}, **skipping, restart=True)
    source = done.manifest["sources"]["a"]
    assert source["documents"] == 5 and source["skipped"] == {kind: 1}


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "gz-noise"])
def test_broken_files(kind: str, tmp_path: Path, prepared: Any, documents: list[str]) -> None:
    plain = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    path = tmp_path / f"a.jsonl.{kind.split('-')[0]}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": documents}), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "gz-noise":
        path.write_bytes(b"this is no gzip file")
    else:
        data = {"gz": gzip.compress, "zst": zstandard.compress}[kind](plain)
        path.write_bytes(data[: len(data) * 3 // 4])
    good = write_jsonl(tmp_path / "b.jsonl", documents[:3])
    with pytest.raises(UserError, match=f"whole .*{path.name}"):
        prepared(tmp_path / "out", {"a": str(path), "b": str(good)})
    done = prepared(tmp_path / "out", {"a": str(path), "b": str(good)}, bad_input="skip", restart=True)
    assert done.manifest["sources"]["a"]["skipped"] == {"broken_file": 1}
    assert done.manifest["sources"]["b"]["documents"] == 3


def test_errors_of_worker_processes_arrive(tmp_path: Path, prepared: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 200 + BAD["missing_field"] + GOOD * 200)
    with pytest.raises(UserError, match="field 'text'.*found body"):
        prepared(tmp_path / "out", {"a": str(path)}, workers=2, task_bytes=2000)


def test_nothing_to_read(tmp_path: Path, prepared: Any) -> None:
    with pytest.raises(UserError, match=r"sources\.a\.path.*exist"):
        prepared(tmp_path / "out", {"a": str(tmp_path / "nothing" / "*.txt")})
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="at least one document"):
        prepared(tmp_path / "out", {"a": str(tmp_path / "a.txt")})


def test_finished_output_is_kept(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    done = prepared(tmp_path / "out", {"a": str(path)})
    before = tree(done.folder)
    assert prepared(tmp_path / "out", {"a": str(path)}).seconds == 0
    with pytest.raises(UserError, match="same options"):
        prepared(tmp_path / "out", {"a": str(path)}, shard_tokens=1000)
    broken = tmp_path / "b.jsonl"
    broken.write_bytes(BAD["invalid_json"])
    with pytest.raises(UserError, match="JSON object"):
        prepared(tmp_path / "out", {"a": str(broken)}, overwrite=True)
    assert tree(done.folder) == before
    replaced = prepared(tmp_path / "out", {"a": str(path)}, shard_tokens=1000, overwrite=True, restart=True)
    assert len(replaced.manifest["shards"]) > len(done.manifest["shards"])
    shard = done.folder / next(iter(replaced.manifest["shards"]))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{shard.name} with .* bytes"):
        prepared(tmp_path / "out", {"a": str(path)}, shard_tokens=1000)


def test_other_options_than_the_unfinished_one(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD["invalid_json"])
    with pytest.raises(UserError, match="JSON object"):
        prepared(tmp_path / "out", {"a": str(path)})
    write_jsonl(path, documents)
    with pytest.raises(UserError, match="same input.*--restart"):
        prepared(tmp_path / "out", {"a": str(path)})
    assert prepared(tmp_path / "out", {"a": str(path)}, restart=True).manifest["sources"]["a"]["documents"] == 60


def _hold(partial: str, held: Any) -> None:
    from moda.files import locked

    with locked(Path(partial), "output", "preparation"):
        held.set()
        time.sleep(60)


def test_two_preparations_at_once(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "out.partial"), held))
    other.start()
    try:
        assert held.wait(30)
        with pytest.raises(UserError, match=f"no other preparation.*process {other.pid}"):
            prepared(tmp_path / "out", {"a": str(path)})
    finally:
        other.kill()
        other.join()
    assert prepared(tmp_path / "out", {"a": str(path)}).seconds > 0  # the lock went with its process


def test_full_disk(tmp_path: Path, documents: list[str], prepared: Any, monkeypatch: Any) -> None:
    from moda.data.prepare import steps

    path = write_jsonl(tmp_path / "a.jsonl", documents)
    whole = prepared(tmp_path / "whole", {"a": str(path)}, task_bytes=5000)

    class Full(steps._Part):
        def write(self, ids: Any) -> None:
            if "00002" in self._tokens.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(ids)

    monkeypatch.setattr(steps, "_Part", Full)
    with pytest.raises(UserError, match="enough disk space.*run the same command again"):
        prepared(tmp_path / "out", {"a": str(path)}, task_bytes=5000)
    assert not list((tmp_path / "out.partial").rglob("*.partial"))
    monkeypatch.undo()
    assert tree(prepared(tmp_path / "out", {"a": str(path)}, task_bytes=5000).folder) == tree(whole.folder)


def test_output_that_is_something_else(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="prepared here"):
            prepared(tmp_path / "out", {"a": str(path)}, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
