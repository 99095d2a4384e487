"""What the server in front and the router say to each other about a request: how to route it, and where it went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ropewalk.cluster.prefixes import Chain

URL, KEY = "url", "key"  # in a replica's metadata: where its own server listens, and what lets in


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is answered. replica: its name within the deployment. key: what lets in; see `tickets`."""

    replica: str
    url: str
    key: str


class Route:
    """How a request is to be routed. chain: what its prompt begins with. avoid: names of replicas that failed on it.

    on_placed: called by the router's thread as soon as it has decided. All of this is for the router, which is in the
    process of the caller: on the way to a replica, a route is empty.
    """

    __slots__ = ("avoid", "chain", "on_placed")

    def __init__(
        self, chain: Chain = (), avoid: tuple[str, ...] = (), on_placed: Callable[[Place], None] | None = None
    ) -> None:
        self.chain, self.avoid, self.on_placed = chain, avoid, on_placed

    def __reduce__(self) -> tuple[Any, ...]:
        return Route, ()
