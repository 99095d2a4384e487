"""Errors as clients of OpenAI expect them: {"error": {"message", "type", "param", "code"}} with a status."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from ropewalk.base.errors import (
    ContextLengthError,
    QueueFullError,
    RequestError,
    RopewalkError,
    SavedCacheError,
    UnsupportedError,
)
from ropewalk.faces.server.notes import NOTES

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
SHOWN_PROBLEMS = 3  # of a request with many wrong fields
SHOWN_CHARACTERS = 200  # of a message, in the log

Hide = Callable[[str], str]


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. param: the field at fault; code: a word for programs.

    for_log: what the log says instead of the message, which has only what the client may know.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    for_log: str = ""

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The same as a response. Plain ASCII: what a client sent may have no UTF-8 form."""
        return Response(json.dumps(self.body), self.status, dict(self.headers), "application/json")


@dataclass(eq=False)
class FieldError(Exception):
    """An error of the engine about a field of the request."""

    field: str
    error: RopewalkError


@contextmanager
def about(field_name: str) -> Iterator[None]:
    """What the engine refuses in the `with` block is about this field of the request.

    Raises:
        FieldError: it refused something.
    """
    try:
        yield
    except (RequestError, UnsupportedError) as error:
        raise FieldError(field_name, error) from error


def api_error(error: Exception, hide: Hide, retry_after_s: int = 1) -> ApiError:
    """What a client is told about an error of the engine. hide: removes paths of this machine from a message."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return replace(api_error(error.error, hide, retry_after_s), param=error.field)
    if not isinstance(error, RopewalkError):
        logger.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
    message = str(error)
    told = ApiError(500, hide(message), for_log=message)
    if isinstance(error, QueueFullError):
        told.status, told.code, told.headers = 429, "queue_full", {"Retry-After": str(retry_after_s)}
    elif isinstance(error, (RequestError, UnsupportedError)):
        told.status, told.code = 400, "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    else:
        told.code = "cache_folder_failed" if isinstance(error, SavedCacheError) else None
        logger.error("%s", error)
    return told


def no_cache_folder(status: int, param: str | None = None) -> ApiError:
    """The error for what needs a folder of kept prompts."""
    message = "this server keeps no prompts: it was started without --cache-folder DIR"
    return ApiError(status, message, param, "no_cache_folder")


def note_error(scope: Scope, error: ApiError) -> None:
    """Leave the message for the request's line in the log."""
    message = error.for_log or error.message
    scope[NOTES].details.append(message.encode("ascii", "backslashreplace").decode()[:SHOWN_CHARACTERS])


def install_error_handlers(app: FastAPI, hide: Hide) -> None:
    """Give every error of the application that shape, including FastAPI's own."""

    def answer(request: Request, error: ApiError) -> Response:
        note_error(request.scope, error)
        return error.response()

    async def of_ours(request: Request, error: Exception) -> Response:
        return answer(request, api_error(error, hide))

    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return answer(request, validation_error(error.errors()))

    async def of_http(request: Request, error: HTTPException) -> Response:
        return answer(request, http_error(request, error))

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(FieldError, of_ours)
    app.add_exception_handler(RopewalkError, of_ours)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, of_ours)


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """A request whose body is not JSON, or whose fields have the wrong types."""
    named: dict[str, dict[str, None]] = {}  # a field that may have several types has a complaint from each
    for problem in problems:
        named.setdefault(_field(problem["loc"]), {})[str(problem["msg"])] = None
    field_name = next(iter(named))
    if not field_name:
        reason = next(iter(named[""]))
        if problems[0]["type"] == "string_unicode":
            return ApiError(400, f"the name of a field is not a text: {reason}")
        return ApiError(400, f"a JSON object and the header Content-Type: application/json are needed ({reason})")
    texts = [f"{name}: {' or '.join(messages)}" for name, messages in named.items()]
    more = f" (and {len(texts) - SHOWN_PROBLEMS} more)" if len(texts) > SHOWN_PROBLEMS else ""
    return ApiError(400, "; ".join(texts[:SHOWN_PROBLEMS]) + more, param=field_name)


def http_error(request: Request, error: HTTPException) -> ApiError:
    """An unknown path, a wrong method, a body that FastAPI could not read."""
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError(404, f"there is no {request.method} {request.url.path} here", code="unknown_url")
    if error.status_code == 405:
        allowed = headers.get("Allow", headers.get("allow", "another method"))
        message = f"{request.url.path} does not take {request.method}, but {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


def _field(location: Sequence[Any]) -> str:
    """("body", "messages", 0, "role") -> "messages.0.role"; the types of a union are left out."""
    parts = [str(part) for part in location if part not in ("body", "str", "int", "bool")]
    return ".".join(part for part in parts if part.isidentifier() or part.isdigit())
