"""A rank that no longer answers is named, and the job ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from moda.train.heartbeat import HeartbeatCallback, Watch
from tests.tiny import PROCESSES, _train, write_config


def test_a_silent_rank_is_named_and_one_that_has_ended_is_not() -> None:
    store, now = dist.HashStore(), [0.0]
    first, second, third = (Watch(store, rank, 3, 10, lambda: now[0]) for rank in range(3))
    for now[0] in (5.0, 10.0, 15.0):
        first.beat()
        second.beat()
        if now[0] == 5:
            third.beat()
        assert not first.hanging() and not second.hanging()
    now[0] = 15.5
    assert first.hanging() == second.hanging() == [f"2 on {socket.gethostname()}"]
    third.beat(done=True)
    now[0] = 20.0
    second.beat()
    assert first.hanging() == []
    now[0] = 30.5
    assert first.hanging() == [f"1 on {socket.gethostname()}"], "not the one that is done"


def test_a_rank_is_heard_while_it_waits_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("localhost", 0, 1, True, timeout=timedelta(seconds=3))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def wait() -> None:
        with contextlib.suppress(dist.DistError):
            store.get("never")

    waiting, heartbeat = threading.Thread(target=wait), HeartbeatCallback(timeout=1)
    other = store.clone()  # type: ignore[attr-defined]
    waiting.start()
    time.sleep(0.2)
    heartbeat.pre_train()
    time.sleep(1)
    assert waiting.is_alive() and other.check(["moda/beat/0"])
    heartbeat.post_train()
    waiting.join()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [1, 0], ids=["another", "the store's"])
def test_a_frozen_rank_ends_the_job(frozen: int, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, train={"max_steps": 100_000}, parallel={"hang_timeout": 2}, checkpoint={"interval": 10**6}
    )
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    joined = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    printed = str(tmp_path / "stdout"), str(tmp_path / "stderr")
    ranks = [
        PROCESSES.Process(target=_train, args=([str(config)], {**joined, "RANK": r, "LOCAL_RANK": r}, printed))
        for r in "01"
    ]
    try:
        for p in ranks:
            p.start()
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
            assert time.monotonic() < deadline and ranks[0].is_alive(), Path(printed[1]).read_text()
            time.sleep(0.2)
        pid = ranks[frozen].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        ranks[1 - frozen].join(30)
        assert ranks[1 - frozen].exitcode == 1
        named = f"rank 1 on {socket.gethostname()}" if frozen else "the ranks' store, which rank 0 may keep"
        assert f"no sign of life for 2 s from {named}" in Path(printed[0]).read_text()
        assert json.loads(metrics.read_text().splitlines()[-1])["step"] > 1
    finally:
        for p in ranks:
            p.kill()
