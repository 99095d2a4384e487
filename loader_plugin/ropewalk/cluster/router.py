"""Ray Serve's interface for routers, over `routing.py`: every handle to the replicas has one of these."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ropewalk.cluster.prefixes import Chain
from ropewalk.cluster.routing import MOST_AHEAD, MOST_REMEMBERED, PrefixRouting


class Route:
    """How a request is to be routed. chain: what its prompt begins with. avoid: names of replicas that failed on it.

    It means something to the router alone, which is in the process of the caller: on the way to a replica it is empty.
    """

    __slots__ = ("avoid", "chain")

    def __init__(self, chain: Chain = (), avoid: tuple[str, ...] = ()) -> None:
        self.chain, self.avoid = chain, avoid

    def __reduce__(self) -> tuple[Any, ...]:
        return Route, ()


class PrefixRouter(RequestRouter):
    """Sends each request where `PrefixRouting` says. Requests that carry no `Route` go to the least busy replica."""

    def initialize_state(self, most_ahead: int = MOST_AHEAD, most_remembered: int = MOST_REMEMBERED) -> None:
        """Called by Ray, with the arguments that the deployment was given for its router."""
        self._routing: PrefixRouting[ReplicaID] = PrefixRouting(most_ahead, most_remembered)
        self._placed: dict[str, ReplicaID] = {}  # requests that were placed and are not over: request -> replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates in the order in which they should be tried."""
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        route = _route_of(pending_request)
        avoid = [replica_id for replica_id in replicas if replica_id.unique_id in route.avoid]
        order = self._routing.order(route.chain, self._loads(list(replicas)), avoid)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray asks again at once while all are full
            if order:
                self._place_(pending_request, order[0])
        return [[replicas[replica_id]] for replica_id in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray when a replica was given the request, which need not be the one that was tried first."""
        self._placed[pending_request.metadata.internal_request_id] = replica_id
        self._routing.sent_(replica_id, _route_of(pending_request).chain)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray when a request is over, however it ended."""
        self._placed.pop(internal_request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when replicas come or go."""
        super().update_replicas(replicas)
        self._routing.keep_only_(replica.replica_id for replica in replicas)

    def _loads(self, replicas: list[ReplicaID]) -> dict[ReplicaID, int]:
        """How many requests each has: those from here, or what it said itself lately, which counts those of others."""
        ours = Counter(self._placed.values())
        return {replica: max(ours[replica], self.replica_queue_len_cache.get(replica) or 0) for replica in replicas}

    def _place_(self, request: PendingRequest, replica: ReplicaID) -> None:
        """Count it at once: of requests that come together, each must see those before it."""
        name = request.metadata.internal_request_id
        self._placed[name] = replica

        def forget_if_given_up(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                self._placed.pop(name, None)

        request.future.add_done_callback(forget_if_given_up)


def _route_of(request: PendingRequest | None) -> Route:
    """The route among the arguments of a call."""
    arguments = () if request is None else request.args
    return next((value for value in arguments if isinstance(value, Route)), Route())
