"""The turns of an engine's requests: waiting for one, and holding it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ropewalk.base.errors import RequestError
from ropewalk.engine.text_stream import TextRequest
from ropewalk.engine.turn_queue import Ticket, TurnQueue

WAIT_STEP_S = 0.05  # how often a waiting request checks whether it has been cancelled


class Turns:
    """Gives a request its turn: with the ticket that its caller has, or with one of its own."""

    def __init__(self, queue: TurnQueue) -> None:
        self._queue = queue
        self._holders: list[int] = []  # threads whose requests run without a ticket from the caller
        self._busy: set[Ticket] = set()  # tickets of callers whose streams run

    @contextmanager
    def take(self, request: TextRequest) -> Iterator[bool]:
        """Wait for the request's turn and hold it; gives False if cancelled while waiting.

        Raises:
            RequestError: this thread, or the ticket, is busy with another stream; or the ticket is closed.
        """
        ticket = request.ticket
        if ticket is not None:
            with self._use(ticket):
                yield self._await(ticket, request)
            return
        thread = threading.get_ident()
        if self._holders.count(thread) == self._queue.num_turns:
            raise RequestError(
                "this engine is still busy with a stream that this thread began: exhaust it or close() it first"
            )
        with self._queue.enter(client=request.client, priority=request.priority) as ticket:
            has_turn = self._await(ticket, request)
            self._holders.append(thread)
            try:
                yield has_turn
            finally:
                self._holders.remove(thread)

    @contextmanager
    def _use(self, ticket: Ticket) -> Iterator[None]:
        """Raises:
        RequestError: another stream is using this ticket.
        """
        if ticket in self._busy:
            raise RequestError("a ticket allows one stream at a time: exhaust or close() the first one")
        self._busy.add(ticket)
        try:
            yield
        finally:
            self._busy.discard(ticket)

    def _await(self, ticket: Ticket, request: TextRequest) -> bool:
        """Wait for the turn; False if cancelled while waiting.

        Raises:
            RequestError: the ticket is closed, so its turn will never come.
        """
        started = time.perf_counter()
        while not ticket.wait(WAIT_STEP_S):
            if ticket.closed:
                raise RequestError("this ticket is closed: enter the queue again")
            if request.cancelled():
                return False
        request.queue_s = time.perf_counter() - started
        return True
