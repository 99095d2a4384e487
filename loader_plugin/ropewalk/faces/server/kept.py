"""The routes of kept prompts: which there are, what one is, and deleting one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from ropewalk.engine.kept import KeptPrompts
from ropewalk.engine.kept_folder import KeptFile
from ropewalk.faces.server.errors import ApiError, Hide, no_cache_folder

if TYPE_CHECKING:
    from ropewalk.engine.engine import Engine


def add_kept_routes(app: FastAPI, engine: Engine, hide: Hide) -> None:
    """Files are read in other threads than that of the event loop."""
    kept = engine.kept

    @app.get("/v1/caches")
    async def list_caches() -> JSONResponse:
        """The kept prompts, those of use most recently first."""
        cards = await _in_thread(kept, lambda: [_card(kept, file, hide) for file in kept.folder.list()])
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/caches/{name}")
    async def retrieve_cache(name: str) -> JSONResponse:
        """One kept prompt."""
        found = await _in_thread(kept, lambda: kept.folder.find(name))
        if found is None:
            raise _unknown(name)
        return JSONResponse(_card(kept, found, hide))

    @app.delete("/v1/caches/{name}")
    async def delete_cache(name: str) -> JSONResponse:
        """Delete a kept prompt. What memory has of it stays until it is needed for something else."""
        if not await _in_thread(kept, lambda: kept.folder.remove(name)):
            raise _unknown(name)
        return JSONResponse({"id": name, "object": "cache", "deleted": True})


async def _in_thread(kept: KeptPrompts, do: Callable[[], Any]) -> Any:
    if kept.folder is None:
        raise no_cache_folder(404)
    return await asyncio.to_thread(do)


def _card(kept: KeptPrompts, file: KeptFile, hide: Hide) -> dict[str, Any]:
    """usable: whether the model, as it is loaded, can start from it; if not, problem says why."""
    problem = kept.problem_of(file)
    return {
        "id": file.name,
        "object": "cache",
        "bytes": file.num_bytes,
        "tokens": None if file.saved is None else file.saved.description.num_tokens,
        "used": int(file.used_s),
        "usable": problem is None,
        "problem": None if problem is None else hide(problem),
    }


def _unknown(name: str) -> ApiError:
    return ApiError(
        404, f"there is no kept prompt {name[:200]!r} here: GET /v1/caches lists them", code="cache_not_found"
    )
