"""Who is asking: a random name in a cookie keeps people apart and finds their conversations again after a reload.

The same layer forbids browsers to load anything from elsewhere, so that the page works without a network and tells
nobody that it is open.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

COOKIE = "ropewalk_visitor"
YEAR_S = 365 * 24 * 3600
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks. person: keeps conversations apart, the same after a reload; tab: one open page of that person."""

    person: str
    tab: str


class VisitorCookie:
    """ASGI middleware: names new browsers, and sends the policy with every answer."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_new = f"{COOKIE}=".encode() not in headers.get(b"cookie", b"")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                if is_new:
                    added.append((b"set-cookie", _new_cookie(scope).encode()))
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def visitor_of(username: str | None, cookies: Any, session_hash: str | None) -> Visitor:
    """The person (by login, else by cookie, else this one session) and the open page."""
    tab = session_hash or "no session"
    cookie = dict(cookies or {}).get(COOKIE)
    if username:
        return Visitor(person_of_login(username), tab)
    return Visitor(f"cookie {cookie}" if cookie else f"session {tab}", tab)


def person_of_login(username: str) -> str:
    """The person of a visitor who logged in under that name."""
    return f"login {username}"


def _new_cookie(scope: Message) -> str:
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    return f"{COOKIE}={secrets.token_urlsafe(24)}; Max-Age={YEAR_S}; Path=/; HttpOnly; SameSite=Lax{secure}"
