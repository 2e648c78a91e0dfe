"""Which rank hangs: every process says at intervals that it is alive, and the others notice when one no longer does."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.callbacks import Callback

log = logging.getLogger(__name__)

_DONE = "done"


class Watch:
    """The signs of life of all ranks, in a store that they share. Hosts' clocks need not agree.

    :param timeout: seconds without a sign after which a rank hangs.
    """

    def __init__(
        self, store: dist.Store, rank: int, ranks: int, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._rank, self._timeout, self._clock = store, rank, timeout, clock
        self._beats = 0
        self._seen = {other: (b"", clock()) for other in range(ranks) if other != rank}
        store.set(f"moda/host/{rank}", socket.gethostname())

    def beat(self, done: bool = False) -> None:
        """Say that this rank is alive, or that it has ended."""
        self._beats += 1
        self._store.set(f"moda/beat/{self._rank}", _DONE if done else str(self._beats))

    def hanging(self) -> list[str]:
        """The ranks without a sign for too long, each with its host."""
        found = []
        for rank, (sign, since) in self._seen.items():
            key = f"moda/beat/{rank}"
            now = self._store.get(key) if self._store.check([key]) else b""
            if now != sign:
                self._seen[rank] = now, self._clock()
            elif now != _DONE.encode() and self._clock() - since > self._timeout:
                host = f"moda/host/{rank}"
                found.append(f"{rank} on {self._store.get(host).decode() if self._store.check([host]) else 'its host'}")
        return found


@dataclass
class HeartbeatCallback(Callback):
    """Ends a job of several ranks, and names the rank, when a process stops: frozen, swapped out, or on a host that is gone.

    :param timeout: seconds without a sign of life.
    """

    timeout: float = 600.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def pre_train(self) -> None:
        # torch has no public name for it. A connection of its own: on one that is shared, a main thread that waits for a key, as
        # NCCL does for the first collective of a group, would keep this rank silent.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        watch = Watch(store, get_rank(), get_world_size(), self.timeout)
        self._thread = threading.Thread(target=self._run, args=(watch,), name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self, watch: Watch) -> None:
        try:
            while not self._stop.wait(min(10.0, self.timeout / 4)):
                # Where rank 0 keeps the store, nothing answers while it is frozen, and a question waits for ever.
                unanswered = threading.Timer(self.timeout, self._end_job, ["the ranks' store, which rank 0 may keep"])
                unanswered.daemon = True
                unanswered.start()
                try:
                    watch.beat()
                    ranks = watch.hanging()
                finally:
                    unanswered.cancel()
                if ranks:
                    self._end_job(f"rank {', '.join(ranks)}")
            watch.beat(done=True)
        except dist.DistError as e:  # the store went with its host, and the launcher ends this job
            log.warning("ranks are no longer watched: %s", str(e).splitlines()[0])

    def _end_job(self, silent: str) -> None:
        log.error("no sign of life for %g s from %s: this job ends; the same command resumes it", self.timeout, silent)
        sys.stdout.flush()
        os._exit(1)

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def post_train(self) -> None:
        self._end()

    def on_error(self, exc: BaseException) -> None:
        self._end()
