"""generate/scheduler/plan.py and timing.py: which rows go into a step, without threads and without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.generate.scheduler.plan import (
    BATCH,
    INTERACTIVE,
    MOST_PASSED,
    PAGE_ROWS,
    Reader,
    Want,
    find_leaders,
    plan_rows,
    share_fairly,
    shared_length,
)
from ropewalk.generate.scheduler.timing import FIRST_ROWS, LEAST_ROWS, MOST_ROWS, StepTimes
from ropewalk.model.work import KEY_COST, TokenWork

wants = st.lists(
    st.builds(
        Want,
        number=st.integers(0, 10**6),
        rows=st.integers(1, 5000),
        is_reply=st.booleans(),
        client=st.none() | st.integers(0, 3),
        priority=st.sampled_from([INTERACTIVE, BATCH]),
    ),
    max_size=20,
    unique_by=lambda want: want.number,
)


@settings(max_examples=300)
@given(wants, st.integers(1, 2048))
def test_replies_get_all_their_rows_and_prompts_share_the_whole_budget(asked: list[Want], budget: int) -> None:
    rows = plan_rows(asked, budget)
    prompts = {want.number: want for want in asked if not want.is_reply}
    assert all(rows[want.number] == want.rows for want in asked if want.is_reply)
    assert all(1 <= rows[number] <= want.rows for number, want in prompts.items() if number in rows)
    given_out = sum(count for number, count in rows.items() if number in prompts)
    assert given_out == min(budget, sum(want.rows for want in prompts.values()))


@settings(max_examples=300)
@given(wants, st.integers(1, 2048))
def test_batch_prompts_get_only_what_interactive_ones_leave(asked: list[Want], budget: int) -> None:
    rows = plan_rows(asked, budget)
    prompts = [want for want in asked if not want.is_reply]
    if any(want.priority == BATCH and want.number in rows for want in prompts):
        interactive = [want for want in prompts if want.priority == INTERACTIVE]
        assert all(rows.get(want.number) == want.rows for want in interactive)


def test_a_short_prompt_goes_at_once_beside_a_long_one_that_goes_on() -> None:
    rows = plan_rows([Want(1, 4000), Want(2, 30)], 128)
    assert rows == {1: 98, 2: 30}


def test_the_shortest_prompt_has_all_rows_until_another_one_is_due() -> None:
    long, short = Want(1, 4000, passed=MOST_PASSED - 1), Want(2, 300)
    assert plan_rows([long, short], 128) == {2: 128}
    assert plan_rows([replace(long, passed=MOST_PASSED), short], 128) == {1: 64, 2: 64}


def test_clients_share_the_rows_whatever_number_of_prompts_they_have() -> None:
    many = [Want(number, 1000, client="many") for number in range(9)]
    assert plan_rows([*many, Want(9, 1000, client="one")], 256) == {0: 256}
    rows = plan_rows([*many, Want(9, 1000, client="one", passed=MOST_PASSED)], 256)
    assert rows[9] == 128 and all(rows[number] in (14, 15) for number in range(9))


def test_a_clients_own_short_prompts_do_not_keep_its_long_one_waiting_for_ever() -> None:
    short = [Want(number, 20, client="one") for number in range(2, 9)]
    rows = plan_rows([Want(1, 4000, client="one", passed=MOST_PASSED), *short], 64)
    assert rows == dict.fromkeys(range(1, 9), 8)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.integers(16, 256), st.booleans())
def test_nobody_goes_without_rows_for_long(lengths: list[int], budget: int, is_one_client: bool) -> None:
    left = dict(enumerate(lengths))
    passed, newest = dict.fromkeys(left, 0), len(lengths)
    for step in range(60):
        if step % 2:  # short prompts arrive all the time
            newest += 1
            left[newest], passed[newest] = 4, 0
        client = "one" if is_one_client else None
        rows = plan_rows([Want(number, left[number], client=client, passed=passed[number]) for number in left], budget)
        for number in list(left):
            left[number] -= rows.get(number, 0)
            passed[number] = 0 if number in rows else passed[number] + 1
            if not left[number]:
                del left[number]
        assert all(passed[number] <= MOST_PASSED for number in left)


@settings(max_examples=300)
@given(wants, st.lists(st.floats(1.0, 9.0), min_size=20, max_size=20), st.integers(1, 512), st.booleans())
def test_rows_with_many_keys_before_them_are_fewer(
    asked: list[Want], row_works: list[float], budget: int, is_due: bool
) -> None:
    passed = MOST_PASSED if is_due else 0
    asked = [
        replace(want, row_work=work, passed=passed, is_reply=False)
        for want, work in zip(asked, row_works, strict=False)
    ]
    rows = plan_rows(asked, budget)
    given = [(rows[want.number], want.row_work) for want in asked if want.number in rows]
    spent = sum(count * work for count, work in given)
    largest = max((work for _, work in given), default=0.0)
    assert spent <= budget + largest and bool(asked) == bool(rows)


def test_a_short_prompt_beside_a_deep_one_has_more_rows_than_that() -> None:
    deep = Want(1, 4000, row_work=4.0)
    assert plan_rows([deep], 60) == {1: 15}
    assert plan_rows([deep, Want(2, 30)], 60) == {2: 30, 1: 8}
    assert plan_rows([replace(deep, passed=MOST_PASSED), Want(2, 300)], 60) == {1: 8, 2: 28}
    assert plan_rows([replace(deep, row_work=500.0)], 60) == {1: 1}


def test_of_many_deep_prompts_each_has_its_turn() -> None:
    left = dict.fromkeys(range(6), 50)
    passed = dict.fromkeys(left, 0)
    while left:
        rows = plan_rows([Want(n, left[n], passed=passed[n], row_work=8.0) for n in left], 12)
        assert 8 <= 8 * sum(rows.values()) <= 20
        left = {number: count - rows.get(number, 0) for number, count in left.items() if count > rows.get(number, 0)}
        passed = {number: 0 if number in rows else passed[number] + 1 for number in left}
        assert all(count <= MOST_PASSED + 6 for count in passed.values())


@given(st.dictionaries(st.integers(), st.integers(0, 100), max_size=8), st.integers(0, 500))
def test_fair_parts_differ_only_where_less_is_wanted(wanted: dict[int, int], budget: int) -> None:
    parts = share_fairly(wanted, budget, sorted(wanted))
    assert sum(parts.values()) == min(budget, sum(wanted.values()))
    most = max(parts.values(), default=0)
    assert all(part >= most - 1 or part == wanted[key] for key, part in parts.items())


def reader(number: int, length: int, done: int = 0, origin: object = None, **other) -> Reader:
    return Reader(number, list(range(length)), done, origin, **other)


def test_a_prompt_waits_for_the_pages_that_one_ahead_of_it_computes() -> None:
    assert find_leaders([reader(1, 1000), reader(2, 1000), reader(3, 500)]) == {2: 1, 3: 1}
    assert find_leaders([reader(1, 1000, 128), reader(2, 130, 64)]) == {}  # all that they share is there
    assert find_leaders([reader(1, 1000, 64), reader(2, 130)]) == {2: 1}


def test_a_prompt_does_not_wait_for_pages_that_it_could_not_use() -> None:
    assert find_leaders([reader(1, 1000), reader(2, 1000, origin="storm")]) == {}
    assert find_leaders([reader(1, PAGE_ROWS), reader(2, PAGE_ROWS)]) == {}  # its last token is computed anyway
    assert find_leaders([Reader(1, [5] * 100, 0, None), Reader(2, [6] * 100, 0, None)]) == {}
    assert find_leaders([reader(1, 1000, priority=BATCH), reader(2, 1000)]) == {1: 2}


readers = st.lists(
    st.builds(
        lambda number, text, length, done, batch: Reader(
            number, [text] * length, min(done, length), None, BATCH if batch else INTERACTIVE
        ),
        st.integers(0, 10**6),
        st.integers(0, 1),
        st.integers(1, 300),
        st.integers(0, 300),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.number,
)


@settings(max_examples=300)
@given(readers)
def test_nobody_waits_in_a_circle(waiting: list[Reader]) -> None:
    leaders = find_leaders(waiting)
    for number in leaders:
        seen = {number}
        while number in leaders:
            number = leaders[number]
            assert number not in seen
            seen.add(number)


def test_what_two_prompts_share_is_counted_in_full_pages() -> None:
    common = list(range(150))
    assert shared_length([*common, 1], [*common, 2]) == 2 * PAGE_ROWS
    assert shared_length(common[: 2 * PAGE_ROWS], common) == PAGE_ROWS  # but for its last token


def test_beside_replies_a_step_takes_less_than_three_plain_ones() -> None:
    times = StepTimes()
    for _ in range(30):
        times.record(0, 0.1)
        times.record(100, 0.1 + 100 * 0.002)
    assert times.budget(num_replies=4, num_prompts=1, most_rows=2048) in range(50, 61)
    assert times.budget(num_replies=0, num_prompts=1, most_rows=2048) == 2048
    assert times.budget(num_replies=0, num_prompts=2, most_rows=2048) == MOST_ROWS


def test_the_time_of_a_row_is_measured_by_its_work() -> None:
    work = TokenWork(weights=2400, key=1, windows=(None, 16))
    assert work.operations(100) == 2400 + 100 + 16
    assert work.beside_first(0) == 1
    assert work.beside_first(1000) == pytest.approx(1 + KEY_COST * 1016 / 2400)
    times = StepTimes()
    for _ in range(30):
        times.record(0, 0.1)
        times.record(30 * work.beside_first(2000), 0.1 + 30 * work.beside_first(2000) * 0.002)
    assert times.budget(num_replies=4, num_prompts=1, most_rows=2048) in range(50, 61)


def test_the_budget_has_bounds_whatever_is_measured() -> None:
    times = StepTimes()
    assert times.budget(1, 1, 2048) == FIRST_ROWS
    for row_s, expected in ((10.0, LEAST_ROWS), (1e-9, MOST_ROWS)):
        times = StepTimes()
        times.record(0, 0.05)
        times.record(64, 0.05 + 64 * row_s)
        assert times.budget(1, 1, 2048) == expected
        assert times.budget(1, 1, 3) == min(3, expected)
