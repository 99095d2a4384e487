"""generate/scheduler/overlap.py: steps of several sequences under way at once, with the tokens of each alone.

Ranks are threads, as in test_pipeline.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import RankError, RequestError
from ropewalk.generate.scheduler.overlap import OverlappingSteps
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from thread_ranks import start_ranks_as_threads

NUM_TOKENS = 12


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Model]]:
    start_ranks_as_threads(monkeypatch)
    write_checkpoint(tmp_path, {"num_hidden_layers": 4}, desc_act=True)
    loaded = []

    def load_with(**options: Any) -> Model:
        loaded.append(load_model(tmp_path, 256, threads=1, **options))
        return loaded[-1]

    yield load_with
    for model in loaded:
        model.close()


def prompt(number: int) -> list[int]:
    shared = [(11 * place + 3) % 128 for place in range(70)] if number % 2 else []
    return shared + [(37 * place * (number + 1) + 11) % 128 for place in range(9 + 13 * number)]


def reply(scheduler: Scheduler, number: int, length: int = NUM_TOKENS) -> list[int]:
    """The most likely tokens after a prompt."""
    with scheduler.open(prompt(number)) as sequence:
        logits, tokens = sequence.forward(sequence.prompt_ids), []
        for _ in range(length):
            tokens.append(int(logits[-1].argmax()))
            logits = sequence.forward(tokens[-1:])
    return tokens


def together(scheduler: Scheduler, count: int, one: Callable[..., Any] = reply) -> list[Any]:
    """What each of so many threads gets: its result, or its error."""
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            found[number] = one(scheduler, number)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a reply hangs"
    return [found[number] for number in range(count)]


@pytest.mark.parametrize("pipeline", ["1,3", 3])
def test_replies_that_overlap_have_the_tokens_of_each_alone(load: Callable[..., Model], pipeline: Any) -> None:
    alone = Scheduler(load())
    expected = [reply(alone, number) for number in range(7)]
    model = load(pipeline=pipeline)
    most, begin = [0], model.begin_step

    def watched(spans: list[Span]) -> Any:
        most[0] = max(most[0], 1 + len(scheduler._steps._under_way))
        return begin(spans)

    model.begin_step = watched
    scheduler = Scheduler(model, patience=50.0)  # steps of so few layers are over before a thread wakes
    assert isinstance(scheduler._steps, OverlappingSteps)
    assert together(scheduler, 7) == expected
    assert 1 < most[0] <= model.steps_under_way


def test_sequences_that_have_to_give_up_pages_have_the_same_tokens(load: Callable[..., Model]) -> None:
    model = load()
    memory = model.cache_bytes(256) * 3 // 2
    expected = [reply(Scheduler(model), number) for number in range(6)]
    scheduler = Scheduler(load(pipeline=2, cache_memory=memory))
    assert together(scheduler, 6, lambda *args: reply(*args, length=NUM_TOKENS)) == expected
    long = together(scheduler, 6, lambda *args: reply(*args, length=60))
    plain = Scheduler(load(cache_memory=memory))
    assert long == [reply(plain, number, 60) for number in range(6)]
    assert scheduler.num_preempted > 0


def test_errands_and_cancelled_calls_come_between_steps(load: Callable[..., Model]) -> None:
    model = load(pipeline=3)
    scheduler, seen = Scheduler(model), []

    def one(scheduler: Scheduler, number: int) -> Any:
        if number == 5:
            return [scheduler.between_steps(lambda: seen.append(len(scheduler._steps._under_way))) for _ in range(5)]
        if number == 4:
            with scheduler.open(prompt(number)) as sequence:
                asked = iter(range(100))
                assert sequence.forward(sequence.prompt_ids, cancelled=lambda: next(asked) > 0) is None
                return sequence.length <= len(sequence.prompt_ids)
        return reply(scheduler, number)

    found = together(scheduler, 6, one)
    expected = Scheduler(load())
    assert found[:4] == [reply(expected, number) for number in range(4)]
    assert found[4] is True and seen == [0] * 5


def test_a_bad_request_and_a_lost_rank_are_errors_of_those_who_wait(load: Callable[..., Model]) -> None:
    model = load(pipeline=2)
    scheduler = Scheduler(model)

    def one(scheduler: Scheduler, number: int) -> Any:
        if number == 0:
            with scheduler.open(prompt(0)) as sequence:
                return sequence.forward([500])
        if number == 1:
            found = reply(scheduler, number, 5)
            model.close()
            return found
        return reply(scheduler, number, 100)

    errors = together(scheduler, 4, one)
    assert isinstance(errors[0], RequestError)
    assert [type(error) for error in errors[2:]] == [RankError, RankError]


def test_a_step_can_be_begun_and_finished_apart(load: Callable[..., Model]) -> None:
    model, plain = load(pipeline=3), load()
    caches = [model.new_cache() for _ in range(3)]
    running = [model.begin_step([Span(prompt(number), cache)]) for number, cache in enumerate(caches)]
    for number, step in enumerate(running):
        (logits,) = step.finish_()
        assert torch.equal(logits, plain.forward(prompt(number), plain.new_cache()))
