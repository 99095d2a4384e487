"""Waiting for so long and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if it takes longer. As `asyncio.wait_for` is from Python 3.12 on: before
    that, a cancellation of the caller that came together with the result was lost.

    Raises:
        asyncio.TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    finally:
        task.cancel()
    if not done:
        await asyncio.wait([task])
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
