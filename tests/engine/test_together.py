"""Requests that wait, run together, end early or exclude each other."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest

from engines import GREEDY, PROMPT, engine_of, engine_that_says
from ropewalk.base.errors import QueueFullError, RequestError
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import Tokenizer


def test_a_stream_closed_early_frees_the_engine(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    stream = engine.stream(PROMPT, GREEDY)
    next(stream)
    stream.close()
    assert stream.finish_reason == engine.last_finish_reason == "cancelled"
    assert list(stream) == []
    assert engine.generate(PROMPT, GREEDY).text == " fox jumps over"


def test_a_stream_that_is_dropped_frees_the_engine_at_once(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over")
    gc.disable()
    try:
        for _ in engine.stream(PROMPT, GREEDY):
            break
        assert engine.generate(PROMPT, GREEDY).text == " fox jumps over"
    finally:
        gc.enable()


def test_a_second_stream_of_one_thread_is_refused_instead_of_waiting_forever(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over", max_running=1)
    stream = engine.stream(PROMPT, GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="still busy with a stream that this thread began"):
        engine.generate(PROMPT, GREEDY)
    assert "".join(stream).endswith("over")


def test_threads_take_turns_and_get_the_same_text(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over the lazy dog")
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(engine.generate(PROMPT, GREEDY).text), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(texts) == 4
    assert len(set(texts)) == 1


def test_a_request_that_waits_can_be_cancelled(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over", max_running=1)
    running = engine.stream(PROMPT, GREEDY)
    next(running)
    waiting = threading.Event()
    results = []

    def cancelled() -> bool:
        waiting.set()
        return True

    thread = threading.Thread(target=lambda: results.append(engine.generate(PROMPT, GREEDY, cancelled)), daemon=True)
    thread.start()
    assert waiting.wait(10)
    thread.join(timeout=10)
    assert (results[0].text, results[0].finish_reason, results[0].stats) == ("", "cancelled", None)
    assert "".join(running).endswith("over")


def random_requests() -> list[tuple[str, SamplingParams]]:
    prompts = ["A ropewalk is a long", "The quick brown fox", "A ropewalk is a long straight lane", "rope"]
    return [
        (prompts[number % 4], SamplingParams(temperature=1.0, seed=number, max_new_tokens=6 + number, logprobs=2))
        for number in range(12)
    ]


@pytest.mark.parametrize("max_running", [2, 3])
def test_requests_that_run_together_get_bit_for_bit_what_they_get_alone(tmp_path: Path, max_running: int) -> None:
    engine = engine_of(tmp_path, max_running)
    requests = random_requests()
    alone = [Engine(engine.model, engine.tokenizer).generate(*request) for request in requests]
    together: dict[int, object] = {}

    def run(number: int) -> None:
        together[number] = engine.generate(*requests[number])

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [(done.text, done.steps) for done in alone] == [
        (together[number].text, together[number].steps) for number in range(len(requests))
    ]


def test_one_thread_can_hold_as_many_streams_as_there_are_caches_and_interleave_them(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, 2)
    requests = random_requests()[2:5]
    alone = [engine.generate(*request).steps for request in requests]
    first, second, third = (engine.stream(*request) for request in requests)
    next(first)
    next(second)
    with pytest.raises(RequestError, match="still busy with a stream that this thread began"):
        next(third)
    for _ in zip(first, second, strict=False):
        pass
    first.complete(), second.complete()
    assert [first.steps, second.steps] == alone[:2]


def test_a_running_reply_goes_on_while_another_prompt_is_read(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, 2)
    stream = engine.stream("rope", SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True))
    next(stream)
    tokens_seen: list[int] = []
    begun = threading.Event()

    def watch(done: int, total: int) -> None:
        tokens_seen.append(len(stream.steps))
        begun.set()

    prompt = "A ropewalk is a long straight lane " * 2
    other = threading.Thread(target=lambda: engine.generate(prompt, progress=watch, params=GREEDY), daemon=True)
    other.start()
    assert begun.wait(30)  # else the reply could be over before the other prompt is read
    stream.complete()
    other.join(timeout=30)
    assert len(tokens_seen) >= 3  # steps of five rows
    assert all(later - before <= 2 for before, later in zip(tokens_seen, tokens_seen[1:], strict=False))


def test_a_ticket_shows_its_position_and_serves_one_stream_after_another(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over", max_running=1)
    with engine.enter() as ticket, engine.enter() as waiting:
        assert (ticket.position, waiting.position) == (0, 1)
        for _ in range(2):
            assert engine.generate(PROMPT, GREEDY, ticket=ticket).text == " fox jumps over"
        first = engine.stream(PROMPT, GREEDY, ticket=ticket)
        next(first)
        with pytest.raises(RequestError, match="one stream at a time"):
            engine.generate(PROMPT, GREEDY, ticket=ticket)
        first.close()
        assert not waiting.has_turn
    with pytest.raises(RequestError, match="this ticket is closed"):
        engine.generate(PROMPT, GREEDY, ticket=ticket)


def test_past_the_queue_limit_a_request_is_refused(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox", max_running=1, queue_limit=1)
    with engine.enter(), engine.enter():
        with pytest.raises(QueueFullError, match="1 running and 1 waiting"):
            engine.enter()
        with pytest.raises(QueueFullError):
            engine.generate(PROMPT, GREEDY)


def test_exclusive_waits_for_running_requests_and_holds_back_the_next(tokenizer: Tokenizer) -> None:
    engine = engine_that_says(tokenizer, " fox jumps over", max_running=2)
    running = engine.enter()
    inside, leave = threading.Event(), threading.Event()

    def change() -> None:
        with engine.exclusive():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    assert not inside.wait(0.1)
    running.close()
    assert inside.wait(10)
    with engine.enter() as ticket:
        assert ticket.position == 1
        leave.set()
        assert ticket.wait(10)
    thread.join(timeout=10)
