"""The server in front of the replicas: the routes of `ropewalk serve`, each request answered by one replica.

    client -> guards (keys, hosts, size) -> call -> Ray's router -> replica -> events -> client

A replica that dies is replaced by another for the requests it had. Clients see nothing of it: a whole reply is sent
once it is complete, and a stream goes on where it stopped (`resume`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass

import aiohttp
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from ropewalk import __version__
from ropewalk.cluster.access import Admission, ReplicaAccess, ReplicaLost
from ropewalk.cluster.calls import Call, call_of
from ropewalk.cluster.front_metrics import FrontMetrics
from ropewalk.cluster.joined_metrics import joined_metrics
from ropewalk.cluster.resume import DONE, SHUTTING_DOWN, ReplicaEnds, ReplyStream, StreamsDiffer
from ropewalk.faces.server.answers import ClientGone, while_connected
from ropewalk.faces.server.app import AppOptions, add_guards, client_of
from ropewalk.faces.server.bodies import read_body
from ropewalk.faces.server.errors import ApiError, Hide, api_error, install_error_handlers
from ropewalk.faces.server.notes import NOTES, Notes
from ropewalk.faces.server.paths import PathHider

logger = logging.getLogger(__name__)

MOST_LOST = 3  # replicas that one request may lose: one that kills every replica must not kill them all
PAUSE_S = 0.2  # before the next: by then Ray has noticed, and if that was the only one, it is waited for
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


@dataclass(slots=True)
class _Reply:
    """What the client has got. status: None until the head of the answer was sent."""

    send: Send
    stream: ReplyStream
    status: int | None = None

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head of the answer."""
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, more: bool = True) -> None:
        """Send a part of its body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def end_with_error(self, body: bytes) -> None:
        """End a stream with an error; the status has been sent."""
        await self.body(b"data: " + body + b"\n\n" + DONE, more=False)


class Front:
    """What all routes but those of the front itself do; an ASGI application. adds_seeds: see `calls.call_of`."""

    def __init__(self, replicas: ReplicaAccess, metrics: FrontMetrics, adds_seeds: bool, hide: Hide) -> None:
        self._replicas, self._metrics, self._adds_seeds, self._hide = replicas, metrics, adds_seeds, hide
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = scope[NOTES]
        try:
            request = Request(scope, receive)
            body = await read_body(request)
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            call = call_of(request, body, client_of(request), self._adds_seeds)
            reply = _Reply(send, ReplyStream())
            await while_connected(receive, self._answer(call, reply, notes))
        except (ClientDisconnect, ClientGone, OSError):
            notes.client_gone = True

    async def _answer(self, call: Call, reply: _Reply, notes: Notes) -> None:
        """Get the answer from a replica, or from the next where one is lost."""
        lost: list[str] = []
        while True:
            try:
                async with self._replicas.admitted(call.chain, tuple(lost)) as admission:
                    notes.details.append(f"replica {admission.place.replica}")
                    await admission.unless_lost(self._pass_on(admission, call, reply))
                    return
            except ReplicaLost as error:
                logger.warning("%s %s: %s", call.method, call.path, error)
                lost.append(error.replica)
                self._metrics.lost.inc()
                failure: Exception = error
                if len(lost) < MOST_LOST:
                    if reply.status is not None:
                        reply.stream.restart_()
                        self._metrics.resumed.inc()
                    await asyncio.sleep(PAUSE_S)
                    continue
            except Exception as error:
                failure = error
            await self._fail(reply, notes, failure)
            return

    async def _pass_on(self, admission: Admission, call: Call, reply: _Reply) -> None:
        """The replica's answer: events as they come, anything else when it is complete."""
        headers = call.headers_with(admission.ticket, admission.place.key)
        async with admission.exchange(call.method, call.path, headers, call.body) as answer:
            if answer.content_type != "text/event-stream":
                await self._pass_on_whole(admission, answer, reply)
                return
            if reply.status is None:
                await reply.begin(answer.status, _headers(answer))
            async for data in answer.content.iter_any():
                try:
                    new = reply.stream.push(data)
                except ReplicaEnds as error:
                    raise ReplicaLost(admission.place.replica, error) from error
                if new:
                    await reply.body(new)
            if not reply.stream.is_complete:
                raise ReplicaLost(admission.place.replica, "its stream broke off")
            await reply.body(b"", more=False)

    async def _pass_on_whole(self, admission: Admission, answer: aiohttp.ClientResponse, reply: _Reply) -> None:
        body = await answer.read()
        if answer.status == 503 and SHUTTING_DOWN in body:
            raise ReplicaLost(admission.place.replica, "it is shutting down")
        if reply.status is not None:  # a stream that should have gone on, and was refused
            await reply.end_with_error(body)
            return
        await reply.begin(answer.status, _headers(answer))
        await reply.body(body, more=False)

    async def _fail(self, reply: _Reply, notes: Notes, failure: Exception) -> None:
        """Tell the client that there will be no (further) answer."""
        error = _api_error(failure, self._hide)
        if reply.status is None:
            raise error from failure
        notes.details.append(f"error {error.status}: {error.for_log or error.message}")
        await reply.end_with_error(json.dumps(error.body).encode())


def create_front(replicas: ReplicaAccess, options: AppOptions) -> FastAPI:
    """The application in front; `app.state.front` is its Front. options: those of `ropewalk serve`."""
    app = FastAPI(title="ropewalk", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    metrics = FrontMetrics()
    hide = PathHider(options.folders).hide
    front = app.state.front = Front(replicas, metrics, options.defaults.seed is None, hide)
    app.state.has_keys = bool(options.api_keys)
    install_error_handlers(app, hide)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether it works, and how busy the replicas are together."""
        states = await replicas.states()
        state = "shutting down" if front.draining else "ok" if states else "no replicas"
        sums = {name: sum(getattr(each, name) for each in states) for name in ("running", "max_running", "waiting")}
        return JSONResponse({"status": state, "replicas": len(states), **sums}, 200 if states else 503)

    @app.get("/metrics")
    async def all_metrics() -> Response:
        """For Prometheus: those of the front, and those of every replica under its name."""
        texts = {state.replica: state.metrics for state in await replicas.states(with_metrics=True)}
        return PlainTextResponse(metrics.text() + joined_metrics(texts), media_type=CONTENT_TYPE_LATEST)

    app.mount("/", front)
    add_guards(app, options, metrics)
    app.router.on_shutdown.append(replicas.close)
    return app


def _headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in answer.raw_headers if name.decode().lower() not in _NOT_PASSED_ON]


def _api_error(failure: Exception, hide: Hide) -> ApiError:
    if isinstance(failure, (ReplicaLost, StreamsDiffer)):
        text = "the replica that wrote this reply was lost, and no other could go on with it; try again"
        return ApiError(503, text, code="replica_lost", headers={"Retry-After": "1"}, for_log=str(failure))
    return api_error(failure, hide)
