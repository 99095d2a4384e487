"""From the bytes of a request to its checked fields. Only the reading happens in the event loop.

Parsing holds Python's global lock from the first byte to the last, so a body of very many values is refused beforehand:
for 10 MB of small ones, counting takes 30 ms, and parsing 200 to 280 ms in which nothing else runs.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from ropewalk.faces.server.errors import ApiError, validation_error

MAX_VALUES = 250_000  # of one body, unless a longer context needs more: numbers, texts, lists and objects

B = TypeVar("B", bound=BaseModel)


async def read_body(request: Request) -> bytes:
    """The whole body, which `BodyLimit` has bounded. The request does not keep it.

    Raises:
        ClientDisconnect: the client went away before its end.
    """
    content = bytearray()
    async for piece in request.stream():
        content += piece
    return bytes(content)


def parse_body(content: bytes, content_type: str, fields: type[B], max_values: int) -> B:
    """The body as a checked request.

    Raises:
        ApiError: it is not declared as JSON, is not JSON, has too many values, or has fields of wrong types.
    """
    if not content or not _is_json(content_type):
        raise validation_error([{"type": "missing", "loc": (), "msg": "Field required"}])
    if count_values(content, max_values) > max_values:
        message = f"the body holds more than {max_values} values, which is the limit here: send several requests"
        raise ApiError(413, message, code="too_many_values")
    try:
        return fields.model_validate(_parsed(content))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_context=False, include_input=False)) from error


def count_values(content: bytes, enough: int) -> int:
    """How many values JSON of these bytes can have at most; once past `enough`, the count may stop.

    What is inside strings does not count, however it is escaped.
    """
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")  # the quotes that are left begin and end strings
    num_strings = plain.count(b'"') // 2
    if num_strings > enough:
        return num_strings
    between = b"".join(plain.split(b'"')[::2])
    return 1 + sum(between.count(sign) for sign in (b",", b"[", b"{"))


def openapi_body(fields: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says about the body of a route that reads it itself."""
    schema = {"$ref": f"#/components/schemas/{fields.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openapi_schemas(*fields: type[BaseModel]) -> dict[str, Any]:
    """The schemas that those references point to, by name."""
    inputs = [(each, "validation") for each in fields]
    return models_json_schema(inputs, ref_template="#/components/schemas/{model}")[1]["$defs"]


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: not UTF-8 ({error.reason})") from error
    except ValueError as error:  # a number of thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is not valid JSON: lists or objects are nested too deeply") from error


def _is_json(content_type: str) -> bool:
    """Nothing else passes as JSON: without a preflight request, a page of another origin can send text but not JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
