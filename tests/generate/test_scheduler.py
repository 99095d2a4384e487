"""generate/scheduler on a fake model: many threads, shared steps, few pages; every reply as alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_model import PAGE, FakeModel
from ropewalk.base.errors import CacheFullError, RequestError
from ropewalk.generate.generate import Generation
from ropewalk.generate.guesses import Guesses
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.speculation import NgramGuesser

CAPACITY = 4 * PAGE


@dataclass(frozen=True)
class Asked:
    """A request: which text its prompt begins, how much of it, its reply, and after how many tokens it leaves."""

    text: int
    length: int
    tokens: int
    leaves_after: int | None = None
    adapters: str | None = None
    client: int | None = None
    priority: str = "interactive"
    guesses: bool = False

    @property
    def prompt(self) -> list[int]:
        """Texts share their first page and a half."""
        return [(place * 7 + (self.text if place >= PAGE + PAGE // 2 else 0)) % 60 for place in range(self.length)]


requests = st.builds(
    Asked,
    text=st.integers(0, 2),
    length=st.integers(1, 3 * PAGE),
    tokens=st.integers(1, 40),
    leaves_after=st.none() | st.integers(0, 5),
    adapters=st.sampled_from([None, None, "storm"]),
    client=st.none() | st.integers(0, 1),
    priority=st.sampled_from(["interactive", "interactive", "batch"]),
    guesses=st.booleans(),
)


def reply_of(scheduler: Scheduler, asked: Asked) -> tuple[list[int], object]:
    params = SamplingParams(seed=asked.length, temperature=0.3, max_new_tokens=asked.tokens)
    guesses = Guesses(NgramGuesser(shortest=1), AlwaysThree()) if asked.guesses else None
    with scheduler.open(asked.prompt, asked.adapters, asked.client, asked.priority) as sequence:
        generation = Generation(sequence, params, guesses=guesses)
        ids = []
        for step in generation:
            ids.append(step.token_id)
            if asked.leaves_after is not None and len(ids) > asked.leaves_after:
                generation.close()
        return ids, generation.stats


class AlwaysThree:
    """A pace that guesses whatever it costs."""

    def wanted(self, others: int = 0) -> int:
        return 3

    def record(self, *measured: object) -> None:
        pass


def in_threads(*calls: Callable[[], object]) -> list[object]:
    """The results of calls that run at once; errors are raised here."""
    results: list[object] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return results


def check_empty(scheduler: Scheduler) -> None:
    """Nothing is left behind but prefixes for later."""
    assert not scheduler._calls and not scheduler._sequences and not scheduler._ended and scheduler._leader is None
    assert scheduler.model.cache_used == scheduler.model.cache_shared


@settings(max_examples=60, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=7),
    st.integers(4, 14) | st.none(),
    st.sampled_from([7, PAGE, 2048]),
    st.sampled_from([None, PAGE, 150]),
    st.sampled_from([None, None, 0, 20]),
)
def test_every_reply_is_as_alone_whatever_runs_beside_it(
    asked: list[Asked], num_pages: int | None, max_input_len: int, turns_at: int | None, kept_back: int | None
) -> None:
    model = FakeModel(
        capacity=CAPACITY, num_pages=num_pages, max_input_len=max_input_len, turns_at=turns_at, kept_back=kept_back
    )
    scheduler = Scheduler(model)
    got = in_threads(*(lambda one=one: reply_of(scheduler, one) for one in asked))
    for one, found in zip(asked, got, strict=True):
        if isinstance(found, BaseException):
            raise found
        alone = Scheduler(FakeModel(capacity=CAPACITY, turns_at=turns_at))
        expected, stats = reply_of(alone, Asked(one.text, one.length, one.tokens, one.leaves_after, one.adapters))
        assert found[0] == expected
        assert found[1].context_used == stats.context_used
    check_empty(scheduler)


def test_prompts_of_several_threads_share_steps() -> None:
    model = FakeModel(capacity=CAPACITY)
    scheduler = Scheduler(model)
    asked = [Asked(text, 100 + text, 20) for text in range(3)]
    barrier = threading.Barrier(3)

    def run(one: Asked) -> list[int]:
        with scheduler.open(one.prompt) as sequence:
            barrier.wait(10)
            return [step.token_id for step in Generation(sequence, SamplingParams(max_new_tokens=20, seed=1))]

    in_threads(*(lambda one=one: run(one) for one in asked))
    assert max(len(step) for step in model.steps) > 1


def test_a_prompt_that_another_one_is_reading_is_computed_once() -> None:
    model = FakeModel(capacity=CAPACITY, max_input_len=16)
    scheduler = Scheduler(model)
    prompt = list(range(60)) * 3
    barrier = threading.Barrier(4)

    def run() -> int:
        with scheduler.open(prompt) as sequence:
            barrier.wait(10)
            sequence.forward(prompt)
            return sequence.reused

    reused = sorted(in_threads(*[run] * 4))
    assert reused[0] == 0 and reused[1:] == [179] * 3 or reused[1] >= 2 * PAGE
    assert sum(map(len, model.calls)) <= len(prompt) + 3 * (len(prompt) - 2 * PAGE)


def test_a_sequence_whose_pages_were_taken_goes_on_as_before() -> None:
    model = FakeModel(capacity=CAPACITY, num_pages=4, turns_at=PAGE)
    scheduler = Scheduler(model)
    with scheduler.open(list(range(60)) * 2) as first, scheduler.open([9] * 150) as second:
        first.forward(first.prompt_ids)
        before = [first.forward([token]) for token in (1, 2, 3)][-1]
        second.forward(second.prompt_ids)  # the same thread: the first one cannot go on anyway
        assert scheduler.num_preempted
        after = first.forward([4])
    alone = Scheduler(FakeModel(capacity=CAPACITY, turns_at=PAGE))
    with alone.open(first.prompt_ids) as sequence:
        sequence.forward(sequence.prompt_ids)
        expected = [sequence.forward([token]) for token in (1, 2, 3, 4)]
    assert before.equal(expected[2]) and after.equal(expected[3])
    check_empty(scheduler)


@pytest.mark.parametrize("length", [0, 1, PAGE, 90, 110, 119])
def test_a_sequence_goes_on_from_where_its_cache_cannot_be_cut_back_to(length: int) -> None:
    tokens = list(range(60)) * 2
    scheduler, alone = (Scheduler(FakeModel(capacity=CAPACITY, turns_at=PAGE, kept_back=kept)) for kept in (10, None))
    with scheduler.open(tokens) as sequence:
        sequence.forward(tokens)
        sequence.truncate(length)
        after = sequence.forward([7, 8], "all")
    with alone.open(tokens) as plain:
        plain.forward(tokens)
        plain.truncate(length)
        assert after.equal(plain.forward([7, 8], "all"))
    check_empty(scheduler)


def test_one_thread_can_alternate_between_sequences_without_waiting() -> None:
    scheduler = Scheduler(FakeModel(capacity=CAPACITY))
    with scheduler.open([1, 2]) as first, scheduler.open([3, 4]) as second:
        first.forward([1, 2]), second.forward([3, 4])
        for token in range(20):
            first.forward([token]), second.forward([token])
    assert scheduler.num_steps == 42
    check_empty(scheduler)


def test_a_pool_that_cannot_hold_a_sequence_refuses_that_request_alone() -> None:
    model = FakeModel(capacity=8 * PAGE, num_pages=3)
    scheduler = Scheduler(model)
    small, large = in_threads(
        lambda: reply_of(scheduler, Asked(0, 30, 10)),
        lambda: reply_of(scheduler, Asked(1, 5 * PAGE, 10)),
    )
    assert len(small[0]) == 10
    assert isinstance(large, CacheFullError)
    check_empty(scheduler)


def test_an_error_of_a_step_reaches_the_request_that_it_belongs_to() -> None:
    class Fragile(FakeModel):
        def step(self, spans, progress=None, cancelled=None):
            if any(list(span.token_ids[:2]) == [61, 61] for span in spans):
                raise RequestError("61 is too much")
            return super().step(spans, progress, cancelled)

    scheduler = Scheduler(Fragile(capacity=CAPACITY))

    def bad() -> None:
        with scheduler.open([61] * 40) as sequence:
            sequence.forward([61] * 40)

    found = in_threads(
        lambda: reply_of(scheduler, Asked(0, 100, 30)), bad, lambda: reply_of(scheduler, Asked(1, 90, 30))
    )
    assert len(found[0][0]) == len(found[2][0]) == 30
    assert isinstance(found[1], RequestError)
    check_empty(scheduler)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["progress", "cancelled", "model"])
def test_whoever_leads_may_fail_or_be_interrupted_and_the_others_go_on(error: type[BaseException], where: str) -> None:
    class Interrupted(FakeModel):
        interrupts: int | None = None

        def step(self, spans, progress=None, cancelled=None):
            if where == "model" and threading.get_ident() == self.interrupts:
                self.interrupts = None
                raise error
            return super().step(spans, progress, cancelled)

    model = Interrupted(capacity=CAPACITY, max_input_len=16)
    scheduler = Scheduler(model)

    def fail(*of: int) -> bool:
        raise error

    def failing() -> None:
        model.interrupts = threading.get_ident()
        with scheduler.open([7] * 100) as sequence:
            callback = {} if where == "model" else {where: fail}
            sequence.forward([7] * 100, **callback)

    others = [Asked(number, 80 + number, 25) for number in range(3)]
    found = in_threads(failing, *(lambda one=one: reply_of(scheduler, one) for one in others))
    assert where == "model" or isinstance(found[0], error)
    for one, got in zip(others, found[1:], strict=True):
        assert got[0] == reply_of(Scheduler(FakeModel(capacity=CAPACITY)), one)[0]
    check_empty(scheduler)


def test_a_cancelled_prompt_leaves_the_others_untouched() -> None:
    model = FakeModel(capacity=CAPACITY, max_input_len=8)
    scheduler = Scheduler(model)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    def leaving() -> int:
        with scheduler.open([5] * 150) as sequence:
            assert sequence.forward([5] * 150, cancelled=cancelled) is None
            return sequence.length

    one = Asked(0, 120, 30)
    length, got = in_threads(leaving, lambda: reply_of(scheduler, one))
    assert 0 <= length < 150
    assert got[0] == reply_of(Scheduler(FakeModel(capacity=CAPACITY)), one)[0]
    check_empty(scheduler)


def test_progress_of_a_prompt_ends_with_all_of_what_nobody_had_computed() -> None:
    scheduler = Scheduler(FakeModel(capacity=CAPACITY, max_input_len=10))
    prompt = list(range(60)) * 2
    seen: list[tuple[int, int]] = []
    with scheduler.open(prompt) as sequence:
        sequence.forward(prompt)
    with scheduler.open([*prompt, 1, 2, 3]) as sequence:
        sequence.forward([*prompt, 1, 2, 3], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 3) for done in (1, 2, 3)]


def test_interactive_requests_are_served_while_batch_ones_give_their_pages_up() -> None:
    model = FakeModel(capacity=CAPACITY, num_pages=5)
    scheduler = Scheduler(model)
    with scheduler.open([1] * 200, priority="batch") as batch:
        batch.forward([1] * 200)
        with scheduler.open([2] * 200) as urgent:
            urgent.forward([2] * 200)
        assert scheduler.num_preempted == 1
        last = batch.forward([3])
    alone = FakeModel(capacity=CAPACITY)
    assert last[0].equal(alone.logits([*[1] * 200, 3]))


def test_a_closed_sequence_computes_nothing() -> None:
    scheduler = Scheduler(FakeModel())
    with scheduler.open([1, 2]) as sequence:
        sequence.forward([1, 2])
    with pytest.raises(RequestError, match="this sequence is closed"):
        sequence.forward([3])
    with pytest.raises(RequestError, match="priority must be one of"), scheduler.open([1], priority="soon"):
        pass


def test_guesses_are_checked_in_one_step_and_change_nothing() -> None:
    model = FakeModel(capacity=CAPACITY, script=lambda history: len(history) % 3)
    scheduler = Scheduler(model)
    plain, guessing = Asked(0, 10, 60), Asked(0, 10, 60, guesses=True)
    ids, stats = reply_of(scheduler, plain)
    steps = scheduler.num_steps
    guessed_ids, guessed_stats = reply_of(scheduler, guessing)
    assert ids == guessed_ids
    assert (stats.guessed_tokens, stats.accepted_tokens) == (0, 0)
    assert guessed_stats.accepted_tokens > 30
    assert scheduler.num_steps - steps < steps / 2
    assert f"guessed {guessed_stats.guessed_tokens}, {guessed_stats.accepted_tokens} right" in guessed_stats.describe()


class RotatesRowsAlike(FakeModel):
    """Sees to it that the rows of a span would be rotated alike if they came one by one."""

    def step(self, spans, progress=None, cancelled=None):
        for span in spans:
            reach, start = span.cache.reach, span.cache.length
            if start:
                one, all_ = (self.reach_of(reach, start + count) for count in (1, len(span.token_ids)))
                assert self.frequencies(one) == self.frequencies(all_)
        return super().step(spans, progress, cancelled)


def test_nothing_is_guessed_over_a_length_at_which_keys_are_turned() -> None:
    def turning() -> FakeModel:
        return RotatesRowsAlike(capacity=CAPACITY, script=lambda history: len(history) % 3, turns_at=30)

    ids, stats = reply_of(Scheduler(turning()), Asked(0, 10, 60, guesses=True))
    assert stats.accepted_tokens > 20
    assert ids == reply_of(Scheduler(turning()), Asked(0, 10, 60))[0]
