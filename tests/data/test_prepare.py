"""Preparation: the same tokens as the tokenizer alone, from every format, whatever runs it."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moda.config.schema import TokenizerSection
from moda.data.prepare.steps import cut_text
from moda.data.tokenizer import load_tokenizer
from moda.errors import UserError
from tests.data_files import tree, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def expected(documents: list[str], fraction: float) -> dict[str, list[int]]:
    """Token files, computed the obvious way: one document at a time."""
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox")).load()
    tokenizer.encode_special_tokens = True
    out: dict[str, list[int]] = {"train": [], "validation": []}
    for d in documents:
        share = int.from_bytes(hashlib.sha256(d.encode()).digest()[:8], "big") / 2**64
        split = "validation" if share < fraction else "train"
        out[split] += tokenizer.encode(d, add_special_tokens=False).ids + [load_eos()]
    return out


def load_eos() -> int:
    return load_tokenizer(TokenizerSection("gpt-neox")).config.eos_token_id


def tokens(folder: Path, split: str, source: str = "a") -> list[int]:
    files = sorted((folder / split).glob(f"{source}-*.npy"))
    return [int(t) for f in files for t in np.fromfile(f, dtype=np.uint16)]


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    done = prepared(tmp_path / "out", {"a": str(path)}, validation_fraction=0.2, shard_tokens=1500, task_bytes=4000)
    want = expected(documents, 0.2)
    for split in ("train", "validation"):
        assert tokens(done.folder, split) == want[split]
    source = done.manifest["sources"]["a"]
    assert source["documents"] == len(documents) and source["tokens"] == sum(map(len, want.values()))
    assert source["bytes"] == sum(len(d.encode()) for d in documents)
    assert done.manifest["tokenizer"] == load_tokenizer(TokenizerSection("gpt-neox")).describe()
    # Shards are as full as whole documents allow, and described exactly.
    for name, entry in done.manifest["shards"].items():
        data = (done.folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        ids = np.frombuffer(data, dtype=np.uint16)
        assert ids[-1] == load_eos() and int((ids == load_eos()).sum()) == entry["documents"]
    train = [e for e in done.manifest["shards"].values() if e["split"] == "train"]
    assert len(train) > 3 and all(750 < e["tokens"] <= 1500 for e in train[:-1])


@pytest.mark.parametrize("kind", ["gz", "xz", "zst", "bz2", "parquet", "lines", "text", "code", "hf", "hf-streaming"])
def test_formats(kind: str, tmp_path: Path, documents: list[str], prepared: Any) -> None:
    documents = documents[:12]
    plain = "".join(json.dumps({"body": d}) + "\n" for d in documents).encode()
    source: dict[str, Any] = {"field": "body"}
    folder = tmp_path / "in"
    folder.mkdir()
    if kind in ("gz", "xz", "bz2", "zst"):
        import zstandard

        pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}[kind]
        half = len(plain) // 2  # two members or frames, as log rotation and pzstd write them
        (folder / f"a.jsonl.{kind}").write_bytes(pack(plain[:half]) + pack(plain[half:]))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"body": documents, "n": range(12)}), folder / "a.parquet", row_group_size=3)
    elif kind == "lines":
        documents = [d.replace("\n", " ") for d in documents]
        (folder / "a.txt").write_text("\n".join(documents) + "\n")
        source["format"] = "lines"
    elif kind in ("text", "code"):
        for i, d in enumerate(documents):
            sub = folder / f"{i // 4}"
            sub.mkdir(exist_ok=True)
            (sub / f"{i:02d}.{'py' if kind == 'code' else 'txt'}").write_text(d)
        (folder / ".git").mkdir()
        (folder / ".git" / "x.py").write_text("not this")
        if kind == "code":
            (folder / "photo.png").write_bytes(b"\x89PNG")
            source["format"] = "code"
    else:
        write_jsonl(folder / "train.jsonl", [])
        (folder / "train.jsonl").write_bytes(plain)
        source.update(format="huggingface", shards=1, streaming=kind == "hf-streaming")
    done = prepared(tmp_path / "out", {"a": {"path": str(folder), **source}}, validation_fraction=0.0, task_bytes=300)
    assert tokens(done.folder, "train") == expected(documents, 0)["train"]


def run_cli(*arguments: str) -> int:
    """The command line in this process."""
    module = runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"))
    before = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["prepare_data.py", *arguments]
    try:
        return module["main"]()
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])


def test_workers_make_no_difference(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    options = {"validation_fraction": 0.1, "shard_tokens": 2000, "task_bytes": 5000}
    one = prepared(tmp_path / "one", {"a": str(path)}, **options)
    two = prepared(tmp_path / "two", {"a": str(path)}, **options, workers=2)
    assert tree(one.folder) == tree(two.folder)


def test_ray_makes_no_difference(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    pytest.importorskip("ray")
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    options = {"shard_tokens": 2000, "task_bytes": 9000}
    local = prepared(tmp_path / "local", {"a": str(path)}, **options)
    on_ray = prepared(tmp_path / "ray", {"a": str(path)}, **options, executor="ray", workers=2)
    assert tree(local.folder) == tree(on_ray.folder)


SBATCH = """#!/bin/bash
export SLURM_NODELIST=localhost SLURM_CPUS_PER_TASK=1 SLURM_MEM_PER_CPU=1 SLURM_GPUS_ON_NODE=0
# Stands in for Slurm: runs the tasks of the array one after the other.
script="${@: -1}"
array=$(sed -n 's/^#SBATCH --array=\\([0-9]*\\)-\\([0-9]*\\).*/\\1 \\2/p' "$script")
set -- $array
for i in $(seq ${1:-0} ${2:--1}); do SLURM_ARRAY_TASK_ID=$i RUN_OFFSET=0 bash "$script" >> "$SBATCH_LOG" 2>&1 || exit 1; done
echo "Submitted batch job 1"
"""


def test_slurm_makes_no_difference(tmp_path: Path, documents: list[str], prepared: Any, monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(SBATCH)
    (fake.parent / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for file in fake.parent.iterdir():
        file.chmod(0o755)
    paths = os.pathsep.join((str(fake.parent), str(Path(sys.executable).parent), os.environ["PATH"]))
    monkeypatch.setenv("PATH", paths)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "sbatch.log"))
    options = {"shard_tokens": 10_000, "task_bytes": 20_000}
    local = prepared(tmp_path / "local", {"a": str(path)}, **options)
    settings = {"time": "1:00:00", "partition": "cpu", "srun_args": None, "with_srun": False}
    on_slurm = prepared(tmp_path / "slurm", {"a": str(path)}, **options, executor="slurm", slurm=settings)
    assert tree(local.folder) == tree(on_slurm.folder)


def test_resume_after_kill(tmp_path: Path, documents: list[str], prepared: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents * 25)
    given = [f"sources.a={path}", "tokenizer=gpt-neox", "task_bytes=20000", "shard_tokens=200000", "workers=1"]
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "tokenize", f"output={out}", *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.partial" / "state" / "parts"
    marks = tmp_path / "out.partial" / "state" / "stages" / "tokenize" / "completions"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (marks.is_dir() and len(list(marks.iterdir())) >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.json") if (marks / p.stem).exists()}
    assert before
    (parts / "00001.train.tokens").unlink()  # finished, then lost: done again
    done = prepared(out, {"a": str(path)}, task_bytes=20_000, shard_tokens=200_000, validation_fraction=0.005)
    whole = prepared(
        tmp_path / "whole", {"a": str(path)}, task_bytes=20_000, shard_tokens=200_000, validation_fraction=0.005
    )
    assert tree(done.folder) == tree(whole.folder)
    assert not (tmp_path / "out.partial").exists()


def test_finished_parts_are_not_made_again(
    tmp_path: Path, documents: list[str], prepared: Any, monkeypatch: Any
) -> None:
    from moda.data.prepare.steps import PartTokenizer, ShardWriter

    path = write_jsonl(tmp_path / "a.jsonl", documents)
    options = {"task_bytes": 5000, "shard_tokens": 2000}
    monkeypatch.setattr(ShardWriter, "run", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stop here")))
    with pytest.raises(UserError, match="stop here"):
        prepared(tmp_path / "out", {"a": str(path)}, **options)
    monkeypatch.undo()
    monkeypatch.setattr(PartTokenizer, "run", lambda *a, **k: pytest.fail("a finished part was made again"))
    done = prepared(tmp_path / "out", {"a": str(path)}, **options)
    monkeypatch.undo()
    assert tree(done.folder) == tree(prepared(tmp_path / "again", {"a": str(path)}, **options).folder)


@pytest.mark.parametrize("mode", ["exact", "minhash"])
def test_dedup(mode: str, tmp_path: Path, documents: list[str], prepared: Any) -> None:
    rng = np.random.default_rng(0)
    unique = [" ".join("".join(w) for w in rng.choice(list("abcdefgh"), (200, 4))) for _ in range(20)]
    repeated = unique + unique[:7]
    if mode == "minhash":
        repeated = unique + [d + " one more word" for d in unique[:7]]
    a, b = write_jsonl(tmp_path / "a.jsonl", repeated[:14]), write_jsonl(tmp_path / "b.jsonl", repeated[14:])
    options = {"dedup": mode, "validation_fraction": 0.0, "task_bytes": 4000}
    one = prepared(tmp_path / "one", {"a": str(a), "b": str(b)}, **options)
    counts = one.manifest["sources"]
    assert counts["a"]["documents"] + counts["b"]["documents"] == 20
    assert counts["a"]["duplicates"] + counts["b"]["duplicates"] == 7
    two = prepared(tmp_path / "two", {"a": str(a), "b": str(b)}, **options, workers=2)
    assert tree(one.folder) == tree(two.folder)


def test_long_documents_are_cut_between_tokens(documents: list[str]) -> None:
    tokenizer = load_tokenizer(TokenizerSection("gpt-neox")).load()
    tokenizer.encode_special_tokens = True
    text = "\n\n".join(documents * 3) + " end" * 200 + "\t\n \n" + "x" * 5000
    stretches = list(cut_text(text, 2000))
    assert "".join(stretches) == text and max(map(len, stretches)) <= 2000 and len(stretches) > 50
    exact = text[:-5000]  # without the part that has no place to be cut at
    ids = [i for s in cut_text(exact, 2000) for i in tokenizer.encode(s, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(exact, add_special_tokens=False).ids


def test_command_line(tmp_path: Path, documents: list[str], capsys: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    file = tmp_path / "prepare.yaml"
    file.write_text(f"output: {tmp_path}/out\ntokenizer: gpt-neox\nsources:\n  a: {path}\n")
    assert run_cli("tokenize", str(file), "workers=1") == 0
    shown = capsys.readouterr().out
    assert "60" in shown and f"{tmp_path}/out/train/*.npy" in shown.replace("\n", "")
    assert run_cli("tokenize", str(file), "workers=2") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run_cli("tokenize", str(file), "shard_token=5") == 2
    assert "shard_tokens" in capsys.readouterr().err


def test_throughput_benchmark(tmp_path: Path, documents: list[str]) -> None:
    from rich.console import Console

    from moda.bench.data import benchmark

    path = write_jsonl(tmp_path / "a.jsonl", documents)
    rows = benchmark(str(path), str(tmp_path / "t.csv"), Console(quiet=True), workers=1, repeats=1)
    assert len((tmp_path / "t.csv").read_text().splitlines()) == len(rows) + 1 == 3
    assert all(r["seconds_median"] > 0 and r["bytes"] == sum(len(d.encode()) for d in documents) for r in rows)


def test_worker_processes_stay_light() -> None:
    """What a task imports needs neither torch nor OLMo-core, which take seconds to load."""
    steps = "steps, dedup, executors"
    code = f"import sys; from moda.data.prepare import {steps}; print({{'torch', 'olmo_core'}} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "evals"))}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr
