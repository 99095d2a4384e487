"""The names by which a server on loopback may be addressed.

Any site can point a domain name of its own at 127.0.0.1, and its pages can then talk to the server as if it were theirs
(DNS rebinding): but the browser still sends that name in the Host header. Programs that are not browsers send what they
were given, which is an address or "localhost".
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from ropewalk.faces.server.errors import ApiError, note_error

ANY = "*"


def is_loopback(host: str) -> bool:
    """Whether a name or address always means this machine: localhost, names below it, 127.0.0.0/8, ::1."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The name in a Host header, or in what a person typed, without port and brackets; anything else as it is."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    name, colon, port = header.rpartition(":")
    return name if colon and ":" not in name and port.isdigit() else header.removesuffix(":")


class HostCheck:
    """Refuses requests addressed to any other name. allowed: names in addition to those of loopback ("*": any).

    A request without a Host header passes: browsers always send one.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = {host_of(name).lower().rstrip(".") for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for header in (value.decode("latin-1") for name, value in scope["headers"] if name == b"host"):
                if not self._allows(header.strip()):
                    error = _not_allowed(header)
                    note_error(scope, error)
                    await error.response()(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _allows(self, header: str) -> bool:
        name = host_of(header)
        return not header or ANY in self._allowed or is_loopback(name) or name.lower().rstrip(".") in self._allowed


def _not_allowed(header: str) -> ApiError:
    return ApiError(
        403,
        f"this server is not called {header[:100]!r}: it answers to localhost, to loopback addresses and to "
        "names given with --allowed-host",
        code="host_not_allowed",
    )
