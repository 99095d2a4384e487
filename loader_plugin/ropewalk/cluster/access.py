"""Requests to the replicas of a deployment, as the server in front sees them: admitted by Ray, answered over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import aiohttp
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from yarl import URL

from ropewalk.base.errors import QueueFullError, RopewalkError
from ropewalk.cluster.places import Place, Route
from ropewalk.cluster.prefixes import Chain
from ropewalk.cluster.replica import State
from ropewalk.cluster.tickets import new_secret

STATE_S = 10.0  # a replica that does not say within this how it is, is left out
IDLE_S = 15.0  # less than a replica keeps connections without a request: it must not be the one that closes them

T = TypeVar("T")
Headers = Sequence[tuple[str, str]]


class ReplicaLost(RopewalkError, RuntimeError):
    """A replica died, or cannot be reached, before its answer was complete. replica: its name; "": none took it."""

    def __init__(self, replica: str, reason: object) -> None:
        super().__init__(f"replica {replica or '?'} was lost: {reason or type(reason).__name__}")
        self.replica = replica


class ReplicaAccess:
    """handle: to the deployment of `replica.Replica`. Use it in one event loop."""

    def __init__(self, handle: DeploymentHandle) -> None:
        # By Ray's gRPC instead of its object store: 2.0 instead of 3.9 ms a call, on two busy cores.
        self._handle = handle.options(_by_reference=False)
        self._ending: set[asyncio.Future[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def admitted(self, chain: Chain, avoid: tuple[str, ...]) -> AsyncIterator[Admission]:
        """A place at a replica, for one exchange. chain, avoid: as for `Route`.

        Ray's call goes on meanwhile: the request itself can leave as soon as the router here knows where to.

        Raises:
            QueueFullError: all replicas have as much to do as they may. ReplicaLost: the replica died.
        """
        loop = asyncio.get_running_loop()
        placed: asyncio.Future[Place] = loop.create_future()
        ticket = new_secret()
        route = Route(chain, avoid, lambda place: loop.call_soon_threadsafe(_set, placed, place))
        call = self._handle.admit.remote(route, ticket)
        end = asyncio.ensure_future(_end_of(call))
        self._ending.add(end)
        end.add_done_callback(self._has_ended)
        try:
            await asyncio.wait((placed, end), return_when=asyncio.FIRST_COMPLETED)
            if not placed.done():
                end.result()
                raise ReplicaLost("", "it was not said which one")
            yield Admission(placed.result(), ticket, end, self._open_session())
        except BaseException:
            call.cancel()
            raise

    def _has_ended(self, end: asyncio.Future[None]) -> None:
        self._ending.discard(end)
        if not end.cancelled():
            end.exception()  # whoever still waits has it; a call that was given up may fail unheard

    async def states(self, with_metrics: bool = False) -> list[State]:
        """How busy each replica is, in the order of their names; those that do not answer are left out."""
        answers = self._handle.broadcast("state", with_metrics)
        try:
            found = await answers.results_async(timeout_s=STATE_S, return_exceptions=True)
        except TimeoutError:
            return []
        return sorted((state for state in found if isinstance(state, State)), key=lambda state: state.replica)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Bodies pass as they are, as slowly as replies are written, and so many at once as there are clients.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


class Admission:
    """A place at a replica. place, ticket: where, and in whose name. end: done when Ray's call is; fails if
    the replica dies."""

    def __init__(self, place: Place, ticket: str, end: asyncio.Future[None], session: aiohttp.ClientSession) -> None:
        self.place, self.ticket = place, ticket
        self._end, self._session = end, session

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, headers: Headers, body: bytes
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The replica's answer, to be read within the `with` block. path: with its query, as the client wrote it."""
        request = self._session.request(
            method, URL(self.place.url + path, encoded=True), headers=headers, data=body, allow_redirects=False
        )
        async with request as answer:
            yield answer

    async def unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which uses `exchange`.

        Raises:
            ReplicaLost: the connection broke, or Ray says that the replica is dead: a lost machine closes nothing.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._end), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self._end.exception() is not None:
                raise ReplicaLost(self.place.replica, self._end.exception()) from self._end.exception()
            return await task
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise ReplicaLost(self.place.replica, error) from error
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, aiohttp.ClientError):
                    await task


async def _end_of(call: Awaitable[None]) -> None:
    """Wait for the end of Ray's call.

    Raises:
        QueueFullError, ReplicaLost: as for `ReplicaAccess.admitted`.
    """
    try:
        await call
    except BackPressureError as error:
        raise QueueFullError("all replicas are busy, and as many requests as may wait do; try again later") from error
    except (RayError, RayServeException) as error:
        raise ReplicaLost("", error) from error


def _set(future: asyncio.Future[Place], place: Place) -> None:
    if not future.done():
        future.set_result(place)
