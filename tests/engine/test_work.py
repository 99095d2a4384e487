"""engine/work.py: work in a thread of its own, its progress, its end, and those that follow it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ropewalk.base.errors import RequestError
from ropewalk.engine.work import Work

PATIENCE_S = 60
LOOK_S = 0.01
LEAVING = """
from ropewalk import SamplingParams
from ropewalk.engine.engine import Engine
from ropewalk.engine.work import Work
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.loader import load_model
from ropewalk.text.tokenizer.load import load_tokenizer

def write(work):
    params = SamplingParams(temperature=0.0, max_new_tokens=400, ignore_eos=True)
    for _ in engine.stream("def f():", params, cancelled=work.is_cancelled):
        work.changed()

engine = Engine(load_model(demo_model_path()), load_tokenizer(demo_model_path()))
work = Work(write)
looks = work.follow(lambda is_over: is_over, 0.01)
next(looks)
work._news.wait()
print("begun")
"""


def test_a_follower_sees_the_progress_and_at_last_the_result() -> None:
    seen = threading.Event()

    def count(work: Work[str]) -> str:
        work.progress(1, 2)
        assert seen.wait(PATIENCE_S)
        return "counted"

    looks = []
    work = Work(count)
    for look in work.follow(lambda is_over: (is_over, work.done_of, work.result), LOOK_S):
        looks.append(look)
        if work.done_of == (1, 2):
            seen.set()
    assert (False, (1, 2), None) in looks
    assert looks[-1] == (True, (1, 2), "counted")
    assert [is_over for is_over, *_ in looks].count(True) == 1


def test_leaving_early_cancels_the_work() -> None:
    ended = threading.Event()

    def until_cancelled(work: Work[None]) -> None:
        while not work.is_cancelled():
            threading.Event().wait(LOOK_S)
        ended.set()

    looks = Work(until_cancelled).follow(lambda is_over: is_over, LOOK_S)
    assert next(looks) is False
    looks.close()
    assert ended.wait(PATIENCE_S)


def test_cancelled_work_ends_with_what_it_has() -> None:
    def until_cancelled(work: Work[str]) -> str:
        while not work.is_cancelled():
            threading.Event().wait(LOOK_S)
        return "half"

    work = Work(until_cancelled)
    looks = work.follow(lambda is_over: is_over, LOOK_S)
    assert next(looks) is False
    work.cancel()
    assert list(looks)[-1] is True
    assert work.result == "half"


def test_an_explained_error_is_kept_for_people_and_any_other_is_raised() -> None:
    def refuse(work: Work[None]) -> None:
        raise RequestError("there is nothing to do")

    def fail(work: Work[None]) -> None:
        raise ZeroDivisionError("ours")

    work = Work(refuse)
    assert list(work.follow(lambda is_over: str(work.error), LOOK_S))[-1] == "there is nothing to do"
    with pytest.raises(ZeroDivisionError, match="ours"):
        list(Work(fail).follow(lambda is_over: is_over, LOOK_S))


def test_an_event_loop_is_woken_by_changes_of_work_in_a_thread_of_a_pool() -> None:
    """As a server does it: no thread waits, the loop is woken."""

    async def serve() -> list[tuple[int, int]]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def three_steps(work: Work[None]) -> None:
            for step in range(3):
                work.progress(step + 1, 3)

        work = Work(three_steps, on_change=lambda: loop.call_soon_threadsafe(news.set))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work.run)
            while not work.is_over:
                await asyncio.wait_for(news.wait(), PATIENCE_S)
                news.clear()
        return [work.done_of]

    assert asyncio.run(serve()) == [(3, 3)]


def test_a_process_that_ends_while_work_is_in_the_core_ends_well() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "begun\n")
