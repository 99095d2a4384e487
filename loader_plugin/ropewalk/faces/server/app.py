"""The routes. What a request means is decided in `requests.py`, how it is answered in `answers.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

from ropewalk import __version__
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.answers import EventStream, whole_answer
from ropewalk.faces.server.bodies import MAX_VALUES, openapi_body, openapi_schemas, parse_body, read_body
from ropewalk.faces.server.errors import ApiError, api_error, install_error_handlers
from ropewalk.faces.server.hosts import HostCheck
from ropewalk.faces.server.jobs import Jobs
from ropewalk.faces.server.kept import add_kept_routes
from ropewalk.faces.server.limits import MAX_BODY_MIB
from ropewalk.faces.server.metrics import Metrics
from ropewalk.faces.server.middleware import CLIENT_GONE, AccessLog, ApiKeys, BodyLimit, RequestCounts
from ropewalk.faces.server.model_names import ModelNames
from ropewalk.faces.server.notes import NOTES
from ropewalk.faces.server.paths import PathHider
from ropewalk.faces.server.replies import ChatShape, ReplyWriter, Shape, TextShape
from ropewalk.faces.server.requests import Desk, Work
from ropewalk.faces.server.schema import ChatRequest, CompletionRequest, EmbeddingsRequest
from ropewalk.generate.sampling import SamplingParams

PREPARING_THREADS = 2  # bodies that are parsed and tokenised at once: each may take memory for a moment

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class AppOptions:
    """base: the model's name. defaults: the settings that requests leave out. api_keys: none, if anyone may use it.

    cors_origins: the web pages that may use this server from a browser ("*": all). allowed_hosts: names by which it
    may be addressed in addition to those of loopback; None: any. max_body_bytes: of one request. folders: those that
    errors may name, which clients are not told.
    """

    base: str
    adapters: Sequence[str] = ()
    defaults: SamplingParams = SamplingParams()
    api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] | None = None
    max_body_bytes: int = MAX_BODY_MIB * 2**20
    folders: Sequence[Path] = ()


class Service:
    """What the routes share. Lives in one event loop."""

    def __init__(self, engine: Engine, options: AppOptions) -> None:
        self.engine = engine
        self.names = ModelNames(options.base, tuple(options.adapters))
        self.desk = Desk(engine, self.names, options.defaults)
        self.jobs = Jobs(engine)
        self.metrics = Metrics(engine)
        self.hide = PathHider([engine.tokenizer.source.parent, *options.folders, Path.home(), Path.cwd()]).hide
        self._max_values = max(MAX_VALUES, 4 * engine.context_size)
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, "ropewalk-prepare")
        self.created = int(time.time())
        self.draining = False

    def drain(self) -> None:
        """Finish the running replies; waiting requests and new ones are refused."""
        self.draining = True
        self.jobs.refuse_waiting(_shutting_down())

    async def cut_off(self) -> None:
        """End what still runs."""
        await self.jobs.shut_down(_shutting_down())
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request, fields: type[R], prepare: Callable[[R], Work], shape: Shape) -> Response:
        """The reply to a completion or chat request. fields: what its body holds. prepare: turns it into `Work`."""
        notes = request.scope[NOTES]
        try:
            work = await self._work(request, fields, prepare)
        except ClientDisconnect:
            notes.client_gone = True
            return Response(status_code=CLIENT_GONE)
        notes.model = work.model
        if work.ignored:
            notes.details.append(f"ignored {', '.join(work.ignored)}"[:200])
        if self.draining:
            raise _shutting_down()
        try:
            job = self.jobs.start(work, client_of(request))
        except Exception as error:
            raise api_error(error, self.hide, self._retry_after_s()) from error
        writer = ReplyWriter(work, shape)
        if work.streams:
            return EventStream(job, writer, self.metrics, self.hide)
        return await whole_answer(request, job, writer, self.metrics)

    async def _work(self, request: Request, fields: type[R], prepare: Callable[[R], Work]) -> Work:
        """What the body asks for; parsed, checked and tokenised outside the event loop."""
        content = await read_body(request)
        content_type = request.headers.get("content-type", "")

        def parsed_and_prepared() -> Work:
            return prepare(parse_body(content, content_type, fields, self._max_values))

        return await asyncio.get_running_loop().run_in_executor(self._preparing, parsed_and_prepared)

    def model_card(self, name: str) -> dict[str, Any]:
        """An entry of the list of models."""
        size = self.engine.context_size
        owner = {"object": "model", "created": self.created, "owned_by": "ropewalk"}
        return {"id": name, **owner, "context_length": size, "max_model_len": size}

    def _retry_after_s(self) -> int:
        """About as long as the queue takes to advance by one, at the pace so far."""
        seconds, count = self.metrics.request_totals()
        return max(1, round(seconds / max(count, 1) / self.engine.queue.num_turns))


def create_app(engine: Engine, options: AppOptions) -> FastAPI:
    """The application; `app.state.service` is its Service."""
    service = Service(engine, options)
    app = FastAPI(title="ropewalk", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.has_keys = bool(options.api_keys)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # as FastAPI documents it
    install_error_handlers(app, service.hide)
    _add_model_routes(app, service)
    _add_reply_routes(app, service)
    _add_state_routes(app, service)
    add_kept_routes(app, engine, service.hide)
    _answer_heads(app)
    add_guards(app, options, service.metrics)
    return app


def add_guards(app: Starlette, options: AppOptions, counts: RequestCounts) -> None:
    """What a request passes before it reaches a route. counts: where it is counted."""
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    app.add_middleware(ApiKeys, keys=tuple(options.api_keys))
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    if options.allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=tuple(options.allowed_hosts))
    app.add_middleware(AccessLog, counts=counts)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the routes, with the bodies that they read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components |= openapi_schemas(CompletionRequest, ChatRequest, EmbeddingsRequest)
        app.openapi_schema = schema
    return app.openapi_schema


def _answer_heads(app: FastAPI) -> None:
    """Answer HEAD wherever GET is answered, as HTTP has it and monitors use it; the description has GET alone."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and "GET" in route.methods:
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def client_of(request: Request) -> Hashable:
    """Who asks, for the queue that is fair between clients: the API key, if the server has any, else the address."""
    key = request.headers.get("authorization") if request.app.state.has_keys else None
    return key or (None if request.client is None else request.client.host)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        """The model, alone and with each of its loaded adapters."""
        return JSONResponse({"object": "list", "data": [service.model_card(name) for name in service.names.listed]})

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> JSONResponse:
        """One model; any sum of adapters counts as one."""
        service.names.adapters_of(model)
        return JSONResponse(service.model_card(model))


def _add_reply_routes(app: FastAPI, service: Service) -> None:
    tokenizer = service.engine.tokenizer

    @app.post("/v1/completions", openapi_extra=openapi_body(CompletionRequest))
    async def complete(request: Request) -> Response:
        """Continue a text."""
        return await service.answer(request, CompletionRequest, service.desk.completion, TextShape(tokenizer))

    @app.post("/v1/chat/completions", openapi_extra=openapi_body(ChatRequest))
    async def chat(request: Request) -> Response:
        """The assistant's next turn."""
        return await service.answer(request, ChatRequest, service.desk.chat, ChatShape(tokenizer))

    @app.post("/v1/embeddings", openapi_extra=openapi_body(EmbeddingsRequest))
    async def embed() -> Response:
        """Refused: a decoder's hidden states make poor embeddings."""
        raise ApiError(
            400,
            "this server has no embeddings: its models write text. Run a model made for embeddings beside it",
            code="unsupported_endpoint",
        )


def _add_state_routes(app: FastAPI, service: Service) -> None:
    queue = service.engine.queue

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether it works, and how busy it is."""
        state = "shutting down" if service.draining else "ok"
        busy = {"running": queue.num_running, "max_running": queue.num_turns}
        return JSONResponse({"status": state, **busy, "waiting": queue.num_waiting, "queue_limit": queue.limit})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
