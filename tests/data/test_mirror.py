"""Mirroring a mix from a server that stalls, breaks off and fails."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moda.config.schema import DataConfig, TokenizerSection
from moda.data import build_training_data, load_tokenizer
from moda.data.mirror import MirrorOptions, mirror
from moda.data.mixes import choose_subset, mix_paths
from moda.errors import UserError

MIX = "OLMoE-mix-0824"


class Server(ThreadingHTTPServer):
    """Serves files by path. ``stalls``, ``cuts`` and ``fails``: how often each path is still to misbehave."""

    daemon_threads = True
    request_queue_size = 128  # of the default 5, connections beyond are dropped on a busy machine and look like stalls

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.stalls: Counter = Counter()
        self.cuts: Counter = Counter()
        self.fails: Counter = Counter()
        self.damages: Counter = Counter()
        self.requests: list[tuple] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        s, data = self.server, self.server.files.get(name)
        ranged = self.headers.get("Range")
        s.requests.append((self.command, name, ranged))
        if data is None:
            return self.send_error(404)
        if self.command == "GET" and s.fails[name] > 0:
            s.fails[name] -= 1
            return self.send_error(500)
        start = int(ranged.split("=")[1].rstrip("-")) if ranged else 0
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        if s.damages[name] > 0:
            s.damages[name] -= 1
            body = b"\0" * len(body)
        if s.stalls[name] > 0 or s.cuts[name] > 0:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if s.stalls[name] > 0:
                s.stalls[name] -= 1
                time.sleep(3)
            else:
                s.cuts[name] -= 1
            self.close_connection = True
            return
        self.wfile.write(body)


def paths() -> list[tuple]:
    return mix_paths("mix", MIX, load_tokenizer(TokenizerSection("dolma2")))


@pytest.fixture
def server() -> Iterator[Server]:
    """A server with small files in the layout of the mix; sources keep their proportions."""
    made = Server()
    rng = np.random.default_rng(0)
    for i, (label, path) in enumerate(paths()):
        tokens = 200 + 10 * (i % 7) if label == "dclm" else 20 + i % 5
        made.files[path] = rng.integers(0, 100_000, tokens).astype(np.uint32).tobytes()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: Any) -> None:
    monkeypatch.setattr("moda.data.mirror._FIRST_PAUSE", 0.01)


def run(server: Server, folder: Path, tokens: Any = 20_000, **changes: Any) -> int:
    flags = {k: changes.pop(k) for k in ("dry_run", "verify") if k in changes}
    options = MirrorOptions(MIX, str(folder), server.url, tokens=tokens, timeout=2.0, retries=4, **changes)
    return mirror(options, Console(quiet=True), **flags)


def chosen(server: Server, tokens: int) -> list[str]:
    sizes = {p: len(d) for p, d in server.files.items()}
    return [p for _, p in choose_subset(paths(), sizes, tokens, 4)]


def test_the_subset_keeps_proportions_and_is_the_same_for_everyone() -> None:
    files = paths()
    sizes = {p: 4 * (1000 + i % 300) for i, (_, p) in enumerate(files)}
    total = sum(sizes.values()) // 4
    small, large = (choose_subset(files, sizes, total // n, 4) for n in (5, 2))
    assert small == choose_subset(list(files), dict(sizes), total // 5, 4)
    assert set(small) < set(large)
    assert small != choose_subset(files, sizes, total // 5, 4, seed=1)
    assert total // 5 <= sum(sizes[p] for _, p in small) // 4 < total // 5 * 1.05
    for label in {label for label, _ in files}:  # its share of the budget, and less than one file more
        whole, taken = (sum(sizes[p] for one, p in dict.fromkeys(f) if one == label) // 4 for f in (files, small))
        assert 0 <= taken - whole * (total // 5) / total < 1300
    with pytest.raises(UserError, match="at most the mix's"):
        choose_subset(files, sizes, total + 1, 4)


def test_a_server_that_misbehaves(server: Server, tmp_path: Path) -> None:
    names = chosen(server, 20_000)
    stalls, cut, fails, damaged = names[0], names[1], names[2], names[3]
    server.stalls[stalls] = 1
    server.cuts[cut] = 2
    server.fails[fails] = 2
    server.damages[damaged] = 1
    assert run(server, tmp_path / "mirror") == 0
    for name in names:
        assert (tmp_path / "mirror" / name).read_bytes() == server.files[name]
    there = {str(p.relative_to(tmp_path / "mirror")) for p in (tmp_path / "mirror").rglob("*.npy")}
    assert there == set(names) and not list((tmp_path / "mirror").rglob("*.part"))
    ranges = Counter(name for method, name, ranged in server.requests if ranged)
    assert ranges[cut] == 2 and ranges[stalls] == 1  # continued, not begun again


def test_resuming_fetches_only_what_is_missing(server: Server, tmp_path: Path) -> None:
    names = chosen(server, 20_000)
    gone = names[4]
    data = server.files[gone]
    sizes = {p: len(d) for p, d in server.files.items()}
    run(server, tmp_path / "mirror", dry_run=True)  # the sizes are known now
    del server.files[gone]
    with pytest.raises(UserError, match=f"{gone}.*run it again"):
        run(server, tmp_path / "mirror")
    assert len(list((tmp_path / "mirror").rglob("*.npy"))) == len(names) - 1  # the others came
    server.files[gone] = data
    part = tmp_path / "mirror" / gone
    part.with_name(f".{part.name}.part").write_bytes(data[:40])
    server.requests.clear()
    run(server, tmp_path / "mirror")
    assert server.requests == [("GET", gone, "bytes=40-")] and part.read_bytes() == data
    # A file that was damaged on the disk is found when asked, and nothing else is fetched.
    part.write_bytes(b"\1" * len(data))
    server.requests.clear()
    run(server, tmp_path / "mirror")
    assert server.requests == []
    run(server, tmp_path / "mirror", verify=True)
    assert [name for _, name, _ in server.requests] == [gone] and part.read_bytes() == data
    # A larger budget adds to the mirror.
    server.requests.clear()
    run(server, tmp_path / "mirror", tokens=40_000)
    assert {n for _, n, _ in server.requests} == set(chosen(server, 40_000)) - set(names)
    assert sum(sizes[n] for n in chosen(server, 40_000)) // 4 >= 40_000


def test_training_reads_the_mirror(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path / "mirror")
    data = DataConfig(mix=MIX, base_dir=str(tmp_path / "mirror"), mix_tokens=20_000, work_dir=str(tmp_path / "work"))
    found = build_training_data(data, load_tokenizer(TokenizerSection("dolma2")), 16)
    assert found.tokens is not None and found.tokens >= 20_000
    assert {d.name for d in found.drawn} == {label for label, _ in paths()}
    whole = DataConfig(mix=MIX, base_dir=str(tmp_path / "mirror"), work_dir=str(tmp_path / "work"))
    with pytest.raises(UserError, match="missing, the first .*prepare_data.py mirror"):
        build_training_data(whole, load_tokenizer(TokenizerSection("dolma2")), 16)
    remote = DataConfig(mix=MIX, base_dir=server.url, mix_tokens=20_000, work_dir=str(tmp_path / "work"))
    from_url = build_training_data(remote, load_tokenizer(TokenizerSection("dolma2")), 16)
    assert from_url.train.paths is not None and found.train.paths is not None
    names = [p.removeprefix(f"{tmp_path}/mirror/") for p in found.train.paths]
    assert names == [p.removeprefix(f"{server.url}/") for p in from_url.train.paths]


def test_validation_sets(server: Server, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerSection("dolma2"))
    sets = mix_paths("mix", "v3-small-ppl-validation", tokenizer)
    server.files = {p: np.array([5, 6, 100257] * 20, dtype=np.uint32).tobytes() for _, p in sets}
    options = MirrorOptions("v3-small-ppl-validation", str(tmp_path / "mirror"), server.url, timeout=1.0)
    assert mirror(options, Console(quiet=True)) == 0
    token_file = tmp_path / "train.npy"
    np.arange(1000, dtype=np.uint32).tofile(token_file)
    data = DataConfig(
        paths=[str(token_file)], validation="v3-small-ppl-validation", base_dir=str(tmp_path / "mirror"),
        work_dir=str(tmp_path / "work"),
    )  # fmt: skip
    found = build_training_data(data, tokenizer, 16)
    assert found.validation is not None
    labels = [m["label"] for m in found.validation.metadata or []]
    assert len(labels) == 11 and "wikitext_103-validation" in labels


def test_unknown_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="OLMoE-mix-0824"):
        mirror(MirrorOptions("OLMoE-mix-824", str(tmp_path), "http://127.0.0.1:9"), Console(quiet=True))
    with pytest.raises(UserError, match="a server that answers, got .*refused"):
        mirror(MirrorOptions(MIX, str(tmp_path), "http://127.0.0.1:9", retries=1), Console(quiet=True))
    assert not list(tmp_path.rglob("*.npy"))
