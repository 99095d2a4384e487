"""The routes. What a request means is decided in `requests.py`, how it is answered in `answers.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ropewalk import __version__
from ropewalk.engine.engine import Engine
from ropewalk.faces.server.answers import EventStream, whole_answer
from ropewalk.faces.server.errors import ApiError, api_error, install_error_handlers
from ropewalk.faces.server.jobs import Jobs
from ropewalk.faces.server.metrics import Metrics
from ropewalk.faces.server.middleware import AccessLog, ApiKeys, BodyLimit
from ropewalk.faces.server.model_names import ModelNames
from ropewalk.faces.server.notes import NOTES
from ropewalk.faces.server.replies import ChatShape, ReplyWriter, Shape, TextShape
from ropewalk.faces.server.requests import Desk, Work
from ropewalk.faces.server.schema import ChatRequest, CompletionRequest, EmbeddingsRequest
from ropewalk.generate.sampling import SamplingParams

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class AppOptions:
    """base: the model's name. defaults: settings of what requests leave out. api_keys: none, if anyone may come.

    cors_origins: the web pages that may use this server from a browser ("*": all).
    """

    base: str
    adapters: Sequence[str] = ()
    defaults: SamplingParams = SamplingParams()
    api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()


class Service:
    """What the routes share. Lives in one event loop."""

    def __init__(self, engine: Engine, options: AppOptions) -> None:
        self.engine = engine
        self.names = ModelNames(options.base, tuple(options.adapters))
        self.desk = Desk(engine, self.names, options.defaults)
        self.jobs = Jobs(engine)
        self.metrics = Metrics(engine.queue)
        self.created = int(time.time())
        self.draining = False

    def drain(self) -> None:
        """Finish the replies that run; those that wait are told to go elsewhere, and so is whoever comes."""
        self.draining = True
        self.jobs.refuse_waiting(_shutting_down())

    async def cut_off(self) -> None:
        """End what still runs."""
        await self.jobs.shut_down(_shutting_down())

    async def answer(self, request: Request, prepare: Callable[[R], Work], body: R, shape: Shape) -> Response:
        """The reply to a completion or chat request."""
        work = await asyncio.to_thread(prepare, body)  # tokenising a long text takes a while
        notes = request.scope[NOTES]
        notes.model = work.model
        if work.ignored:
            notes.details.append(f"ignored {', '.join(work.ignored)}"[:200])
        if self.draining:
            raise _shutting_down()
        try:
            job = self.jobs.start(work)
        except Exception as error:
            raise api_error(error, self._retry_after_s()) from error
        writer = ReplyWriter(work, shape)
        if work.streams:
            return EventStream(job, writer, self.metrics)
        return await whole_answer(request, job, writer, self.metrics)

    def model_card(self, name: str) -> dict[str, Any]:
        """An entry of the list of models."""
        size = self.engine.context_size
        owner = {"object": "model", "created": self.created, "owned_by": "ropewalk"}
        return {"id": name, **owner, "context_length": size, "max_model_len": size}

    def _retry_after_s(self) -> int:
        """About as long as the queue takes to move up by one, at the pace so far."""
        seconds, count = self.metrics.request_totals()
        return max(1, round(seconds / max(count, 1) / self.engine.queue.num_turns))


def create_app(engine: Engine, options: AppOptions) -> FastAPI:
    """The application; `app.state.service` is its Service."""
    service = Service(engine, options)
    app = FastAPI(title="ropewalk", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    install_error_handlers(app)
    _add_model_routes(app, service)
    _add_reply_routes(app, service)
    _add_state_routes(app, service)
    app.add_middleware(BodyLimit)
    app.add_middleware(ApiKeys, keys=tuple(options.api_keys))
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog, metrics=service.metrics)
    return app


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        """The model, and the adapters that are loaded beside it."""
        return JSONResponse({"object": "list", "data": [service.model_card(name) for name in service.names.listed]})

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> JSONResponse:
        """One model; any sum of adapters is one."""
        service.names.adapters_of(model)
        return JSONResponse(service.model_card(model))


def _add_reply_routes(app: FastAPI, service: Service) -> None:
    tokenizer = service.engine.tokenizer

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        return await service.answer(request, service.desk.completion, body, TextShape(tokenizer))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """The assistant's next turn."""
        return await service.answer(request, service.desk.chat, body, ChatShape(tokenizer))

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingsRequest) -> Response:
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
        busy = {"running": queue.num_running, "caches": queue.num_turns}
        return JSONResponse({"status": state, **busy, "waiting": queue.num_waiting, "queue_limit": queue.limit})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
