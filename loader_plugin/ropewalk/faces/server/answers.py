"""From a job to an HTTP answer: one JSON object, or server-sent events. Either way, it ends if the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ropewalk.faces.server.errors import Hide, api_error
from ropewalk.faces.server.jobs import Finished, Job, Piece, Waiting
from ropewalk.faces.server.metrics import Metrics
from ropewalk.faces.server.middleware import CLIENT_GONE
from ropewalk.faces.server.notes import NOTES, Notes
from ropewalk.faces.server.replies import ReplyWriter

KEEP_ALIVE_S = 10.0  # proxies and clients give up on connections that are silent for a minute or so

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def whole_answer(request: Request, job: Job, writer: ReplyWriter, metrics: Metrics) -> Response:
    """The reply as one JSON object, once it is complete."""
    with job:
        try:
            await while_connected(request.receive, _collect(job, writer, metrics, request.scope[NOTES]))
        except ClientGone:
            request.scope[NOTES].client_gone = True
            return Response(status_code=CLIENT_GONE)
    return JSONResponse(writer.whole())


async def _collect(job: Job, writer: ReplyWriter, metrics: Metrics, notes: Notes) -> None:
    async for event in watched(job, metrics, notes):
        writer.collect(event)


class EventStream(Response):
    """The reply as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, writer: ReplyWriter, metrics: Metrics, hide: Hide) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._job, self._writer, self._metrics, self._hide = job, writer, metrics, hide

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._job:
            try:
                await while_connected(receive, self._send_all(scope[NOTES], send))
            except (ClientGone, OSError):
                scope[NOTES].client_gone = True

    async def _send_all(self, notes: Notes, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines(notes):
            await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self, notes: Notes) -> AsyncIterator[str]:
        try:
            for chunk in self._writer.opening():
                yield _event(chunk)
            async for event in watched(self._job, self._metrics, notes):
                if isinstance(event, Waiting):
                    yield _comment(event)
                else:
                    yield _event(self._writer.chunk(event))
            for chunk in self._writer.closing():
                yield _event(chunk)
        except Exception as error:  # the status has been sent: only the stream can still say it
            answer = api_error(error, self._hide)
            notes.details.append(f"error {answer.status}: {answer.for_log or answer.message}")
            yield _event(answer.body)
        yield "data: [DONE]\n\n"


async def watched(job: Job, metrics: Metrics, notes: Notes) -> AsyncIterator[Piece | Finished | Waiting]:
    """The job's events, counted and noted on their way."""
    loop = asyncio.get_running_loop()
    started, first = loop.time(), True
    try:
        async for event in job.events(KEEP_ALIVE_S):
            if isinstance(event, Piece) and first:
                metrics.first_text_seconds.observe(loop.time() - started)
                first = False
            elif isinstance(event, Finished):
                metrics.count_reply(event)
                notes.details += [*([event.routing] if event.routing else []), _described(event)]
            yield event
        metrics.request_seconds.observe(loop.time() - started)
    finally:
        waited = loop.time() - started if job.queue_s is None else job.queue_s
        metrics.queue_seconds.observe(waited)
        notes.details.insert(0, f"queue {waited:.2f} s")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: the client went away.
    """
    tasks = task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _comment(event: Waiting) -> str:
    """Clients skip it; people who watch the stream see where they stand."""
    return f": waiting at position {event.position} of the queue\n\n" if event.position else ": reading the prompt\n\n"


def _described(done: Finished) -> str:
    stats = done.stats
    return (
        f"prompt {stats.prompt_tokens} ({done.cached_tokens} cached), {stats.prompt_tokens_per_s:.0f}/s, "
        f"reply {done.num_tokens}, {stats.new_tokens_per_s:.1f}/s, {done.reason}"
    )
