"""A queue that is fair between clients: who has a turn, who waits for one, and in which position.

    enter -> [ waiting: position 1, 2, ... ] -> called: has its turns -> close

The next turn goes to the highest priority. Among equals, clients take turns, so that one with a hundred requests does
not keep out one with a single one: a ticket gets a *round*, the one after that of its client's last ticket, but none
that is over already, and lower rounds come first (start-time fair queueing). In a round, it is the order of arrival.
A ticket that needs several turns at once is passed by nobody who comes after it.

A ticket may be closed at any time: a waiting one leaves the queue, one with its turn passes it on. Nothing here
knows what a turn is for. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from types import TracebackType

from ropewalk.base.errors import QueueFullError
from ropewalk.generate.scheduler.plan import INTERACTIVE, PRIORITIES, check_client, check_priority


class TurnQueue:
    """Gives out `num_turns` turns. limit: how many tickets may wait (None: any number)."""

    def __init__(self, num_turns: int = 1, limit: int | None = None) -> None:
        self.num_turns = num_turns
        self.limit = limit
        # Reentrant: a stream that is dropped may be closed by the garbage collector while its thread is in here.
        self._lock = threading.RLock()
        self._free = num_turns
        self._waiting: list[Ticket] = []  # in the order of arrival
        self._round = 0  # of the ticket that got its turn last
        self._next_round: dict[Hashable, int] = {}  # of clients that wait or have turns
        self._open: Counter[Hashable] = Counter()  # tickets of these clients

    @property
    def num_waiting(self) -> int:
        """How many tickets are waiting."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many turns are taken."""
        return self.num_turns - self._free

    def enter(
        self,
        on_turn: Callable[[], None] | None = None,
        turns: int = 1,
        client: Hashable = None,
        priority: str = INTERACTIVE,
    ) -> Ticket:
        """Join the queue.

        on_turn: called once, by whichever thread frees the turn (this one, before `enter` returns, if one is free).
        turns: how many are needed at once, at most `num_turns`; later tickets wait behind this one.
        client: who asks; None is a client of its own.

        Raises:
            QueueFullError: the ticket would have to wait, and as many as allowed are already waiting. RequestError: an
                unknown priority, or a client that is not hashable.
        """
        rank = PRIORITIES.index(check_priority(priority))
        ticket = Ticket(self, on_turn, turns, check_client(client), rank)
        with self._lock:
            must_wait = bool(self._waiting) or turns > self._free
            if must_wait and self.limit is not None and len(self._waiting) >= self.limit:
                raise QueueFullError(
                    f"the queue is full: {self.num_running} running and {len(self._waiting)} waiting, which is the "
                    "limit; try again later"
                )
            ticket.round = max(self._round, self._next_round.get(ticket.client, 0))
            self._next_round[ticket.client] = ticket.round + 1
            self._open[ticket.client] += 1
            self._waiting.append(ticket)
            called = self._take_turns()
        _call(called)
        return ticket

    def _position(self, ticket: Ticket) -> int:
        with self._lock:
            return self._in_order().index(ticket) + 1 if ticket in self._waiting else 0

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
                self._close_ranks(ticket)
            self._open[ticket.client] -= 1
            if not self._open[ticket.client]:  # or the queue would remember everybody who ever came
                del self._open[ticket.client]
                self._next_round.pop(ticket.client, None)
            called = self._take_turns()
        _call(called)

    def _take_turns(self) -> list[Ticket]:
        """Give free turns to the front of the queue. The caller holds the lock."""
        called = []
        while self._waiting:
            ticket = self._in_order()[0]
            if ticket.turns > self._free:
                break
            self._waiting.remove(ticket)
            self._free -= ticket.turns
            self._round = max(self._round, ticket.round)
            ticket.has_turn = True
            called.append(ticket)
        return called

    def _in_order(self) -> list[Ticket]:
        """Those that wait, in the order in which they get turns."""
        ordered: list[Ticket] = []
        group: list[Ticket] = []
        for ticket in self._waiting:
            group.append(ticket)
            if ticket.turns > 1:
                ordered += [*sorted(group[:-1], key=_order), ticket]
                group = []
        return ordered + sorted(group, key=_order)

    def _close_ranks(self, gone: Ticket) -> None:
        """A ticket that leaves without a turn does not count for its client."""
        later = [ticket for ticket in self._waiting if ticket.client == gone.client and ticket.round > gone.round]
        for ticket in later:
            ticket.round -= 1
        self._next_round[gone.client] -= 1


class Ticket:
    """A place in a `TurnQueue`, from its `enter`. Used in a `with` block, it is closed at the end.

    rank: of its priority, the most important first. round: see the top of the module.
    """

    def __init__(
        self, queue: TurnQueue, on_turn: Callable[[], None] | None, turns: int, client: Hashable, rank: int
    ) -> None:
        self.turns, self.rank = turns, rank
        self.round = 0
        self.client: Hashable = self if client is None else client
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


def _order(ticket: Ticket) -> tuple[int, int]:
    return ticket.rank, ticket.round


def _call(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket._called.set()
        if ticket._on_turn is not None:
            ticket._on_turn()
