"""What a client sent, made ready for the replicas: where it is to go, and with a seed, so that it can be done again."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ropewalk.cluster.prefixes import Chain, prefix_chain
from ropewalk.cluster.tickets import CLIENT, OURS, PASS, TICKET
from ropewalk.faces.server.bodies import MAX_VALUES, count_values

REPLY_PATHS = ("/v1/chat/completions", "/v1/completions")
# Those that are about one connection, and those that the server in front writes or has read itself.
_NOT_FORWARDED = {
    *(b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"expect", b"upgrade", b"te", b"trailer"),
    *(b"authorization", *OURS),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a client. path: with its query, as it was written. chain: what its prompt begins with."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    chain: Chain = ()

    def headers_with(self, ticket: str, key: str) -> list[tuple[str, str]]:
        """For a replica; see `tickets`."""
        return [*self.headers, (TICKET.decode(), ticket), (PASS.decode(), key)]


def call_of(request: Request, body: bytes, client: Hashable, adds_seed: bool) -> Call:
    """The call that passes this request on. client: who asks, for the queue that is fair between clients. adds_seed: a
    request for a reply that names no seed gets one; otherwise it could not be repeated to the same bits."""
    scope = request.scope
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope["query_string"]
    headers = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in scope["headers"]
        if name not in _NOT_FORWARDED
    ]
    headers.append((CLIENT.decode(), hashlib.blake2b(str(client).encode(), digest_size=8).hexdigest()))  # may be a key
    chain: Chain = ()
    if request.method == "POST" and scope["path"] in REPLY_PATHS:
        fields = _fields(body)
        if fields is not None:
            chain = prefix_chain(fields)
            if adds_seed and fields.get("seed") is None:
                body = with_seed(body, secrets.randbits(63))
    return Call(
        request.method, (path + (b"?" + query if query else b"")).decode("latin-1"), tuple(headers), body, chain
    )


def with_seed(body: bytes, seed: int) -> bytes:
    """A JSON object with a member `seed` at its end, which counts before one that is null. Nothing else is touched."""
    start = body.rstrip()[:-1].rstrip()
    comma = b"" if start.endswith(b"{") else b","
    return start + comma + b'"seed":%d}' % seed


def _fields(body: bytes) -> dict[str, Any] | None:
    """The members of a JSON object; None for anything else, which the replica will refuse."""
    if count_values(body, MAX_VALUES) > MAX_VALUES:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
