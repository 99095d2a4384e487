"""What a replica knows of the requests sent to it: each has a ticket, from Ray's call to the end of its answer.

Ray decides where a request goes and counts it there; its answer then comes straight from the replica, over HTTP, as
Ray's own streams cost more than a token does (docs/cluster.md). The ticket joins the two: the call waits until the
request with its ticket has been answered, and whoever has none is turned away, as only a call can get one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

TICKET = b"x-ropewalk-ticket"
CLIENT = b"x-ropewalk-client"
ARRIVAL_S = 30.0  # between the call and its request: beyond this, whoever called is gone


class Tickets:
    """The open tickets of a replica. Lives in one event loop."""

    def __init__(self) -> None:
        self._open: dict[str, Ticket] = {}

    @contextmanager
    def issue(self) -> Iterator[Ticket]:
        """A ticket that is valid while in the `with` block."""
        ticket = Ticket()
        self._open[ticket.name] = ticket
        try:
            yield ticket
        finally:
            del self._open[ticket.name]

    def find(self, name: str) -> Ticket | None:
        """The open ticket of that name, unless it has been used."""
        ticket = self._open.get(name)
        return None if ticket is None or ticket.is_used else ticket


class Ticket:
    """Permission for one request."""

    def __init__(self) -> None:
        self.name = secrets.token_urlsafe(16)
        self._arrived, self._answered = asyncio.Event(), asyncio.Event()

    @property
    def is_used(self) -> bool:
        """Whether its request has come."""
        return self._arrived.is_set()

    @contextmanager
    def used(self) -> Iterator[None]:
        """While in the `with` block, its request is answered."""
        self._arrived.set()
        try:
            yield
        finally:
            self._answered.set()

    async def wait(self) -> None:
        """Until its request has been answered, or has not come in time."""
        try:
            await asyncio.wait_for(self._arrived.wait(), ARRIVAL_S)
        except asyncio.TimeoutError:
            return
        await self._answered.wait()


class TicketCheck:
    """Around the application of a replica: answers requests with a ticket alone, in the name of the client given."""

    def __init__(self, app: ASGIApp, tickets: Tickets) -> None:
        self._app, self._tickets = app, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        ticket = self._tickets.find(headers.get(TICKET, b"").decode("latin-1"))
        if ticket is None:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this is a replica: ask its server\n"})
            return
        client = (headers.get(CLIENT, b"").decode("latin-1"), 0)
        kept = [(name, value) for name, value in scope["headers"] if name not in (TICKET, CLIENT)]
        with ticket.used():
            await self._app(scope | {"client": client, "headers": kept}, receive, send)
