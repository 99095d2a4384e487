"""Whether the other ranks are there: each says so twice a second in a store that all can read.

A rank that ends shows at once, since its connections close. One that hangs (stopped, swapped out, its machine gone from
the network) shows here: what it counts up in the store stands still. Long computations do not: a thread of its own
counts, and kernels run without Python's lock.

The first rank that notices writes what happened to the store; all others report the same, so that every rank says which
one was lost. The store lives with rank 0 (or torchrun), so whoever cannot reach it any more has lost rank 0.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch.distributed as dist

from ropewalk.base.errors import RankError, brief

BEAT_S = 0.5
PATIENCE_S = 6.0  # until a rank counts as lost: with a beat, and what the store takes, below 10 seconds
STORE_PATIENCE_S = 4.0
FAILED = "failed"


class Watch:
    """The heartbeat of one rank, and its eye on others. names: of all ranks, with what they run, for messages.

    store: a connection of its own, since one that waits keeps others from using it. watched: the ranks that are looked
    after. on_failure: called once, in some thread, with the error that all ranks report. error: that one, or None.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        watched: Sequence[int],
        names: Callable[[int], str],
        on_failure: Callable[[RankError], None],
    ) -> None:
        self._store, self._rank, self._watched = store, rank, tuple(watched)
        self._names, self._on_failure = names, on_failure
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.error: RankError | None = None
        self._thread = threading.Thread(target=self._run, name="ropewalk-watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The pipeline ends as it should: nobody is missed from now on."""
        self._ended.set()

    def fail_(self, rank: int, what: str) -> RankError:
        """A rank is lost: tell all others. Returns the error of whoever told first."""
        text = f"{self._names(rank)}: {what}"
        with suppress(RuntimeError):  # the store is gone, with all who could read it there
            text = self._store.compare_set(FAILED, "", text).decode(errors="replace")
        return self._failed(text)

    def _failed(self, text: str) -> RankError:
        with self._lock:
            first = self.error is None
            if first:
                self.error = RankError(f"the pipeline has failed: {text}")
        if first and not self._ended.is_set():
            self._on_failure(self.error)
        self._ended.set()
        return self.error

    def _run(self) -> None:
        seen = dict.fromkeys(self._watched, (b"", time.monotonic()))
        count = 0
        while not self._ended.is_set():
            try:
                count += 1
                self._store.set(_key(self._rank), str(count))
                if self._store.check([FAILED]):
                    self._failed(self._store.get(FAILED).decode(errors="replace"))
                    return
                for rank, (before, since) in seen.items():
                    found = self._store.get(_key(rank)) if self._store.check([_key(rank)]) else b""
                    if found != before:
                        seen[rank] = found, time.monotonic()
                    elif time.monotonic() - since > PATIENCE_S:
                        self.fail_(rank, f"it has not answered for {PATIENCE_S:g} s")
                        return
            except RuntimeError as error:  # of the store: closed, or out of time
                if not self._ended.is_set():
                    self._failed(f"{self._names(0)}: it cannot be reached any more ({brief(error)})")
                return
            self._ended.wait(BEAT_S)


def _key(rank: int) -> str:
    return f"beat/{rank}"
