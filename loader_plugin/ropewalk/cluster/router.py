"""Ray Serve's interface for routers, over `routing.py`: every handle to the replicas has one of these.

Ray hands this file on by its contents, so that what is defined here exists twice in a process: nothing else may be.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ropewalk.cluster.places import KEY, URL, Place, Route
from ropewalk.cluster.routing import PrefixRouting, Routing, TwoChoices

ROUTINGS: dict[str, Callable[[], Routing[ReplicaID]]] = {"prefix": PrefixRouting, "load": TwoChoices}


class ReplicaRouter(RequestRouter):
    """Sends each request where a `Routing` says. One that carries no `Route` has no prefix, and avoids nobody."""

    def initialize_state(self, routing: str, most_requests: int) -> None:
        """Called by Ray, with the arguments that the deployment has for its router.

        routing: "prefix" or "load". most_requests: that a replica may have; more wait here until one has less.
        """
        self._routing = ROUTINGS[routing]()
        self._most_requests = most_requests
        self._placed: dict[str, ReplicaID] = {}  # requests that were placed and are not over: request -> replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates in the order in which they should be tried; none if all have enough to do."""
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        route = _route_of(pending_request)
        loads = {replica: load for replica, load in self._loads(list(replicas)).items() if load < self._most_requests}
        avoid = [replica for replica in loads if replica.unique_id in route.avoid]
        order = self._routing.order(route.chain, loads, avoid)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray asks again at once while all are full
            if order:
                self._expect_(pending_request, order[0])
        return [[replicas[replica]] for replica in order]

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

    def _expect_(self, request: PendingRequest, replica: ReplicaID) -> None:
        """Count it there at once: of requests that come together, each must see those before it. Ray may still take
        another one of the replicas."""
        name, route = request.metadata.internal_request_id, _route_of(request)
        is_new = name not in self._placed
        self._placed[name] = replica

        def settle(future: asyncio.Future[RunningReplica]) -> None:
            if future.cancelled():
                self._placed.pop(name, None)
                return
            chosen = future.result()
            self._placed[name] = chosen.replica_id
            self._routing.sent_(chosen.replica_id, route.chain)
            if route.on_placed is not None:
                told = chosen.replica_metadata
                route.on_placed(Place(chosen.replica_id.unique_id, told[URL], told[KEY]))

        if is_new:
            request.future.add_done_callback(settle)


def _route_of(request: PendingRequest | None) -> Route:
    """The route among the arguments of a call."""
    arguments = () if request is None else request.args
    return next((value for value in arguments if isinstance(value, Route)), Route())
