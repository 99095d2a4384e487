"""Waiting with a limit: results, the limit, and a caller that is cancelled at any moment."""

from __future__ import annotations

import asyncio

import pytest

from ropewalk.base.patience import within


async def result_of(event: asyncio.Event) -> str:
    await event.wait()
    return "done"


def test_what_takes_longer_is_cancelled() -> None:
    async def main() -> None:
        task = asyncio.ensure_future(result_of(asyncio.Event()))
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, _awaited(task))
        assert task.cancelled()

    asyncio.run(main())


def test_an_error_of_the_work_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(within(5, fails()))


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_beside_the_result_is_not_lost(turns: int) -> None:
    async def main() -> None:
        event = asyncio.Event()
        task = asyncio.ensure_future(within(5, result_of(event)))
        await asyncio.sleep(0.01)
        event.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        was_asked = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == was_asked
        assert was_asked or task.result() == "done"

    asyncio.run(main())


async def _awaited(task: asyncio.Task[str]) -> str:
    return await task
