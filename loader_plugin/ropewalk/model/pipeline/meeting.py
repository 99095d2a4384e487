"""Where the ranks of a pipeline find each other: a store of torch.distributed, and who is there.

    every rank       here/RANK              it has started and can be connected to
    rank 0           begin, or finished     the ranks are to connect, or nothing needs them

A rank that waits here for long is one that waits for rank 0 to load a model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ropewalk.backends.pipeline.watch import STORE_PATIENCE_S
from ropewalk.backends.pipeline.wire import LOOPBACK, Wire
from ropewalk.base.errors import ConfigError, RankError, brief
from ropewalk.model.pipeline.machine import Seat

CONNECTING = timedelta(seconds=120)  # to start Python and import torch on a busy machine, and to reach each other
FINISHING_S = 10.0
LOOK_S = 0.05
BEGIN, FINISHED = "begin", "finished"
PREFIX = "ropewalk"


class Meeting:
    """One rank's view. store, beats: two connections, of which the second is for `Watch`."""

    def __init__(self, seat: Seat, store: dist.Store, beats: dist.Store) -> None:
        self.seat, self._store, self.beats = seat, store, beats

    @classmethod
    def hosted(cls, size: int) -> tuple[Meeting, int]:
        """That of rank 0, on this machine, and the port at which the others find it."""
        server = dist.TCPStore(LOOPBACK, 0, None, True, CONNECTING, wait_for_workers=False)
        seat = Seat(0, size, 0, size)
        return cls(seat, server, _connected(LOOPBACK, server.port)), server.port

    @classmethod
    def visited(cls, seat: Seat, port: int) -> Meeting:
        """That of another rank on this machine."""
        return cls(seat, _connected(LOOPBACK, port), _connected(LOOPBACK, port))

    @classmethod
    def under_torchrun(cls, seat: Seat) -> Meeting:
        """That of a rank that torchrun has started, which has a store of its own, or leaves it to rank 0."""
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ConfigError(f"torchrun sets MASTER_ADDR and MASTER_PORT, and here {error} is missing") from error
        hosts = seat.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            first = _hosted_or_connected(host, port) if hosts else _connected(host, port)
            run = f"{PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            return cls(seat, dist.PrefixStore(run, first), dist.PrefixStore(run, _connected(host, port)))
        except RuntimeError as error:
            raise RankError(f"rank {seat.rank} finds no store at {host}:{port}: {brief(error)}") from error

    def gather(self, check: Callable[[], None]) -> Wire:
        """Rank 0: connect to all others once they are there. check: raises if one cannot come.

        Raises:
            RankError: they do not come in time.
        """
        until = time.monotonic() + CONNECTING.total_seconds()
        wanted = [f"here/{rank}" for rank in range(1, self.seat.size)]
        while not self._store.check(wanted):
            check()
            if time.monotonic() > until:
                missing = [name for name in wanted if not self._store.check([name])]
                raise RankError(f"of {self.seat.size} ranks, {', '.join(missing)} did not come in {CONNECTING}")
            time.sleep(LOOK_S)
        self._store.set(BEGIN, "1")
        return self._connect()

    def wait_to_begin(self) -> Wire | None:
        """Another rank: connect to all others once rank 0 asks for it; None if it never will.

        Raises:
            RuntimeError: the store is gone, and rank 0 with it.
        """
        self._store.set(f"here/{self.seat.rank}", "1")
        while not self._store.check([BEGIN]):
            if self._store.check([FINISHED]):
                return None
            time.sleep(LOOK_S)
        return self._connect()

    def finish(self) -> None:
        """Rank 0: the others are not needed, or not any more."""
        with suppress(RuntimeError):  # they may have gone, and torchrun with its store
            self._store.set(FINISHED, "1")

    def wait_to_finish(self) -> None:
        """Another rank, after its last message: until nobody reads from its connections any more."""
        until = time.monotonic() + FINISHING_S
        with suppress(RuntimeError):  # rank 0 has gone
            while not self._store.check([FINISHED]) and time.monotonic() < until:
                time.sleep(LOOK_S)

    @property
    def has_begun(self) -> bool:
        """Whether the ranks were asked to connect before."""
        return self._store.check([BEGIN])

    def _connect(self) -> Wire:
        try:
            store = dist.PrefixStore("wire", self._store)
            return Wire(store, self.seat.rank, self.seat.size, self.seat.is_alone, CONNECTING)
        except RuntimeError as error:
            raise RankError(f"rank {self.seat.rank} cannot connect to the others: {brief(error)}") from error


def _hosted_or_connected(host: str, port: int) -> dist.TCPStore:
    """The store of rank 0, which this process may host already."""
    try:
        return dist.TCPStore(host, port, None, True, CONNECTING, False)
    except RuntimeError:
        return _connected(host, port)


def _connected(host: str, port: int) -> dist.TCPStore:
    store = dist.TCPStore(host, port, None, False, CONNECTING, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=STORE_PATIENCE_S))
    return store
