"""What joins the two ways on which a request reaches a replica: Ray's call, and the request itself over HTTP.

Ray decides where a request goes and counts it there; the request goes straight to the replica, as Ray's own streams
cost more than a token does, and its calls as much as a short reply (docs/cluster.md). Both start at once, arrive in any
order and bear the same ticket: the call ends when the request has been answered. The pass, which the replica has told
Ray's routers alone, keeps out everybody else.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from ropewalk.base.patience import within

TICKET = b"x-ropewalk-ticket"
PASS = b"x-ropewalk-pass"
CLIENT = b"x-ropewalk-client"
OURS = (TICKET, PASS, CLIENT)
ARRIVAL_S = 30.0  # between the call and its request: beyond this, one of them was lost


def new_secret() -> str:
    """A name that nobody can guess."""
    return secrets.token_urlsafe(16)


class _Ticket:
    """One request."""

    def __init__(self) -> None:
        self.arrived, self.answered = asyncio.Event(), asyncio.Event()


class Tickets:
    """Those of a replica. Lives in one event loop."""

    def __init__(self) -> None:
        self._known: dict[str, _Ticket] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def wait(self, name: str) -> None:
        """Until the request with this ticket has been answered, or has not come in time."""
        ticket = self._known.setdefault(name, _Ticket())
        try:
            await within(ARRIVAL_S, ticket.arrived.wait())
            await ticket.answered.wait()
        except asyncio.TimeoutError:
            return
        finally:
            self._known.pop(name, None)

    @contextmanager
    def used(self, name: str) -> Iterator[None]:
        """While in the `with` block, the request with this ticket is answered."""
        ticket = self._known.setdefault(name, _Ticket())
        ticket.arrived.set()
        try:
            yield
        finally:
            ticket.answered.set()  # and kept for a call that comes late
            asyncio.get_running_loop().call_later(ARRIVAL_S, self._known.pop, name, None)


class TicketCheck:
    """Around the application of a replica: answers those who know its pass, in the name of the client that they say."""

    def __init__(self, app: ASGIApp, tickets: Tickets, key: str) -> None:
        self._app, self._tickets, self._key = app, tickets, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(PASS, b""), self._key):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this is a replica: ask its server\n"})
            return
        client = (headers.get(CLIENT, b"").decode("latin-1"), 0)
        kept = [(name, value) for name, value in scope["headers"] if name not in OURS]
        with self._tickets.used(headers.get(TICKET, b"").decode("latin-1")):
            await self._app(scope | {"client": client, "headers": kept}, receive, send)
