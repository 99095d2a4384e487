"""The ring on which messages travel: each rank hears its predecessor and speaks to its successor.

    rank 0 -> rank 1 -> ... -> rank P-1 -> rank 0

gloo of torch.distributed carries the bytes, as point-to-point messages of a process group of our own: the default group
of the process stays free for others. A message takes two of gloo's: its prefix, then its body. Sending never waits.

gloo closes all its connections when an operation runs out of time, and an idle pipeline has nothing to send: so its
operations have no such limit, and whether the others are there is the business of `watch.py`.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ropewalk.backends.pipeline.messages import PREFIX, Message, body_size, decode, encode
from ropewalk.base.errors import brief

NO_LIMIT = timedelta(days=365)
LOOPBACK = "127.0.0.1"
MOST_UNDER_WAY = 256  # messages that were sent and may not have arrived: more would be a leak of memory


class LostError(Exception):
    """The connection to a rank is closed."""

    def __init__(self, rank: int, error: RuntimeError) -> None:
        said = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]  # a place in gloo's source, and its advice
        super().__init__(f"it has ended, or its connection is lost ({brief(said, 120)})")
        self.rank = rank


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A message as it came; its tensors are views of `body`, so what is written to them is what is passed on."""

    message: Message
    prefix: torch.Tensor
    body: torch.Tensor


class Wire:
    """One rank's end. One thread sends at a time, and one receives.

    store: where ranks find each other. on_loopback: all ranks are on this machine; else gloo chooses the network
    interface (GLOO_SOCKET_IFNAME says which).
    """

    def __init__(self, store: dist.Store, rank: int, size: int, on_loopback: bool, connecting: timedelta) -> None:
        self.rank, self.size = rank, size
        self.before, self.after = (rank - 1) % size, (rank + 1) % size
        options = dist.ProcessGroupGloo._Options()
        options._timeout = connecting
        device = {"hostname": LOOPBACK} if on_loopback else {}
        make = dist.ProcessGroupGloo.create_device if on_loopback else dist.ProcessGroupGloo.create_default_device
        options._devices = [make(**device)]
        self._group = dist.ProcessGroupGloo(store, rank, size, options)
        self._group.barrier().wait(connecting)  # all are there
        self._group.set_timeout(NO_LIMIT)
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send_(self, message: Message) -> None:
        """To the next rank."""
        self._send(*encode(message))

    def pass_on_(self, arrived: Arrived) -> None:
        """To the next rank, with what was written to its tensors."""
        self._send(arrived.prefix, arrived.body)

    def receive(self) -> Arrived:
        """The next message of the rank before; waits for as long as it takes.

        Raises:
            RankError: what came is no message. LostError: the connection to that rank is lost.
        """
        prefix = torch.empty(PREFIX.size, dtype=torch.uint8)
        self._receive_(prefix)
        body = torch.empty(body_size(prefix), dtype=torch.uint8)
        self._receive_(body)
        return Arrived(decode(prefix, body), prefix, body)

    def _receive_(self, out: torch.Tensor) -> None:
        try:
            self._group.recv([out], self.before, 0).wait(NO_LIMIT)
        except RuntimeError as error:
            raise LostError(self.before, error) from error

    def _send(self, *parts: torch.Tensor) -> None:
        try:
            for part in parts:
                self._under_way.append((self._group.send([part], self.after, 0), part))
            while len(self._under_way) > MOST_UNDER_WAY:
                self._under_way.popleft()[0].wait(NO_LIMIT)
        except RuntimeError as error:
            raise LostError(self.after, error) from error
