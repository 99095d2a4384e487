"""A first-come, first-served queue: who has a turn, who waits for one, and in which position.

    enter -> [ waiting: position 1, 2, ... ] -> called: has its turns -> close

A ticket may be closed at any time: a waiting one leaves the queue, one with its turn passes it on. Nothing here
knows what a turn is for. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from ropewalk.base.errors import QueueFullError


class TurnQueue:
    """Gives out `num_turns` turns in order of arrival. limit: how many tickets may wait (None: any number)."""

    def __init__(self, num_turns: int = 1, limit: int | None = None) -> None:
        self.num_turns = num_turns
        self.limit = limit
        self._lock = threading.Lock()
        self._free = num_turns
        self._waiting: deque[Ticket] = deque()

    @property
    def num_waiting(self) -> int:
        """How many tickets are waiting."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many turns are taken."""
        return self.num_turns - self._free

    def enter(self, on_turn: Callable[[], None] | None = None, turns: int = 1) -> Ticket:
        """Join the end of the queue.

        on_turn: called once, by whichever thread frees the turn (this one, before `enter` returns, if one is free).
        turns: how many are needed at once, at most `num_turns`; later tickets wait behind this one.

        Raises:
            QueueFullError: the ticket would have to wait, and as many as allowed are already waiting.
        """
        ticket = Ticket(self, on_turn, turns)
        with self._lock:
            must_wait = bool(self._waiting) or turns > self._free
            if must_wait and self.limit is not None and len(self._waiting) >= self.limit:
                raise QueueFullError(
                    f"the queue is full: {self.num_running} running and {len(self._waiting)} waiting, which is the "
                    "limit; try again later"
                )
            self._waiting.append(ticket)
            called = self._take_turns()
        _call(called)
        return ticket

    def _position(self, ticket: Ticket) -> int:
        with self._lock:
            return self._waiting.index(ticket) + 1 if ticket in self._waiting else 0

    def _close(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.closed:
                return
            ticket.closed = True
            if ticket.has_turn:
                ticket.has_turn = False
                self._free += ticket.turns
            else:
                self._waiting.remove(ticket)
            called = self._take_turns()
        _call(called)

    def _take_turns(self) -> list[Ticket]:
        """Give free turns to the front of the queue. The caller holds the lock."""
        called = []
        while self._waiting and self._waiting[0].turns <= self._free:
            ticket = self._waiting.popleft()
            self._free -= ticket.turns
            ticket.has_turn = True
            called.append(ticket)
        return called


class Ticket:
    """A place in a `TurnQueue`, from its `enter`. Used in a `with` block, it is closed at the end."""

    def __init__(self, queue: TurnQueue, on_turn: Callable[[], None] | None, turns: int) -> None:
        self.turns = turns
        self.has_turn = False
        self.closed = False
        self._queue = queue
        self._on_turn = on_turn
        self._called = threading.Event()

    @property
    def position(self) -> int:
        """1 for the first in line; 0 once it has its turn or is closed."""
        return self._queue._position(self)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the turn; True if it has come and the ticket is not closed."""
        self._called.wait(timeout_s)
        return self.has_turn

    def close(self) -> None:
        """Leave the queue, or pass the turn on; threads waiting on this ticket wake. Closing twice does nothing."""
        self._queue._close(self)
        self._called.set()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StepTurns:
    """Interleaves the steps of one request with those of others: in a `with` block it computes alone.

    The requests that share `line`, a queue with one turn, get one step each in rotation.
    """

    def __init__(self, line: TurnQueue) -> None:
        self._line = line
        self._ticket: Ticket | None = None

    def __enter__(self) -> StepTurns:
        self._ticket = self._line.enter()
        self._ticket.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ticket is not None:
            self._ticket.close()
            self._ticket = None

    def give_way(self) -> None:
        """Within the block: let each waiting request have one step, then continue."""
        if self._line.num_waiting and self._ticket is not None:
            self._ticket.close()
            self._ticket = self._line.enter()
            self._ticket.wait()


def _call(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket._called.set()
        if ticket._on_turn is not None:
            ticket._on_turn()
