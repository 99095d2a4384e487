"""Around every request: its API key, the limit on its body, and a log line and a count when it is over.

Plain ASGI: a wrapper that reads the request would hide the client's disconnect from the routes.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ropewalk.faces.server.errors import ApiError, note_error
from ropewalk.faces.server.notes import NOTES, Notes

access_log = logging.getLogger("ropewalk.faces.server.access")

OPEN_PATHS = ("/health",)
QUIET_PATHS = ("/health", "/metrics")
CLIENT_GONE = 499  # nginx's status for a client that did not wait


class RequestCounts(Protocol):
    """Where requests are counted."""

    @property
    def requests(self) -> Counter: ...
    @property
    def disconnects(self) -> Counter: ...


class AccessLog:
    """Counts each request and writes its line in the log. The routes fill the `Notes` in the scope."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = scope[NOTES] = Notes()
        status = 500
        started = time.perf_counter()

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            self._note(scope, notes, CLIENT_GONE if notes.client_gone else status, time.perf_counter() - started)

    def _note(self, scope: Scope, notes: Notes, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        endpoint = getattr(route, "path", "other")
        self._counts.requests.labels(endpoint, str(status)).inc()
        if notes.client_gone:
            self._counts.disconnects.inc()
        quiet = scope["path"] in QUIET_PATHS and status < 400
        path = scope["path"].encode("ascii", "backslashreplace").decode()
        details = "; ".join(notes.details)
        access_log.log(
            logging.DEBUG if quiet else logging.INFO,
            "%d %s %s%s  %.2f s%s",
            status,
            scope["method"],
            path[:100] if path.isprintable() else "?",
            f"  {notes.model}" if notes.model else "",
            seconds,
            f"  {details}" if details else "",
        )


class ApiKeys:
    """Refuses requests without one of the keys. /health is open, and so are browsers' preflight requests (OPTIONS)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"
        if is_open or not self._keys or self._accepts(dict(scope["headers"]).get(b"authorization", b"")):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed, in the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        note_error(scope, error)
        await error.response()(scope, receive, send)

    def _accepts(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        # All keys are compared, each in constant time: the time reveals nothing about any of them.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, declared or not, before they are in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        received, too_large = 0, declared.isdigit() and int(declared[:20]) > self._max_bytes

        async def counting_receive() -> Message:
            nonlocal received, too_large
            message = await receive()
            received += len(message.get("body", b""))
            too_large = too_large or received > self._max_bytes
            return {"type": "http.disconnect"} if too_large else message

        async def limited_send(message: Message) -> None:
            if not too_large:
                await send(message)

        if not too_large:
            await self._app(scope, counting_receive, limited_send)
        if too_large:
            scope[NOTES].client_gone = False  # the route took the cut-off body for a disconnect
            message = f"the body is larger than {self._max_bytes} bytes, which is the limit here"
            error = ApiError(413, message, code="body_too_large")
            note_error(scope, error)
            await error.response()(scope, receive, send)
