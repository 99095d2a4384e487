"""generate/pace.py on simulated steps: never much slower than plain, clearly faster where guesses come true."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.generate.pace import ALLOWANCE, COUNTS, ROW_COST, START_BALANCE, Pace

STEP_S = {1: 0.023, 2: 0.027, 4: 0.034, 8: 0.050, 16: 0.081, 32: 0.16}  # rows: seconds, 1.1B shape on two cores
NGRAM_S = 2e-5


def step_s(rows: int) -> float:
    """Seconds of a step, linear between those measured."""
    low = max(known for known in STEP_S if known <= rows)
    high = min(known for known in STEP_S if known >= rows)
    share = (rows - low) / (high - low) if high > low else 0.0
    return STEP_S[low] + share * (STEP_S[high] - STEP_S[low])


def draft_s(count: int, behind: int) -> float:
    """Seconds of guessing with a 1.1B model that has to read `behind` tokens first."""
    return count * 0.023 + behind * 0.0019


def ngram_s(count: int, behind: int) -> float:
    return NGRAM_S


def simulated(
    chance: Callable[[int], float],
    tokens: int,
    seed: int = 0,
    others: int = 0,
    slowness: float = 1.0,
    guess_s: Callable[[int, int], float] = ngram_s,
    hiccup: float = 0.03,
    cost: Callable[[int], float] = step_s,
) -> float:
    """Tokens of all replies per second beside plain steps; a guess of the n-th token is right with chance(n)."""
    rng, pace = random.Random(seed), Pace()
    taken = plain = 0.0
    done = behind = steps = 0
    while done < tokens:
        count = pace.wanted(others)
        guessing = guess_s(count, behind) if count else 0.0
        noise = 1.0 + abs(rng.gauss(0.0, hiccup))
        step = cost(1 + others + count) * slowness * noise
        accepted = 0
        while accepted < count and rng.random() < chance(done + accepted):
            accepted += 1
        pace.record(count, accepted, step, guessing, others)
        taken += step + guessing
        plain += cost(1 + others) * slowness * noise * (others + 1 + accepted) / (others + 1)
        done += accepted + 1
        behind = accepted + 1 if count else behind + 1
        steps += 1
    return plain / taken


def always(chance: float) -> Callable[[int], float]:
    return lambda position: chance


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tokens", [100, 300, 2000])
@pytest.mark.parametrize(("guess_s", "slowness"), [(ngram_s, 1.0), (draft_s, 6.5)])
def test_hopeless_guesses_cost_less_than_two_to_three_percent(seed, tokens, guess_s, slowness) -> None:
    speed = simulated(always(0.0), tokens, seed, guess_s=guess_s, slowness=slowness)
    assert speed >= (0.98 if tokens > 100 else 0.97)


@pytest.mark.parametrize(
    ("chance", "least"),
    [(0.5, 1.15), (0.7, 1.4), (0.9, 2.0), (1.0, 4.0)],  # constant lengths chosen by an oracle: 1.32, 1.73, 2.62, 4.57
)
def test_guesses_that_come_true_pay(chance: float, least: float) -> None:
    speeds = sorted(simulated(always(chance), 500, seed) for seed in range(9))
    assert speeds[4] >= least


@pytest.mark.parametrize(("chance", "least"), [(0.7, 1.1), (0.9, 1.4), (1.0, 2.3)])  # by an oracle: 1.35, 1.81, 2.75
def test_a_draft_model_that_is_right_pays(chance: float, least: float) -> None:
    speeds = sorted(simulated(always(chance), 500, seed, guess_s=draft_s, slowness=6.5) for seed in range(9))
    assert speeds[4] >= least


@pytest.mark.parametrize("seed", range(8))
def test_text_that_becomes_predictable_is_noticed(seed: int) -> None:
    assert simulated(lambda position: float(position >= 1000), 2000, seed) >= 1.5


@pytest.mark.parametrize("seed", range(8))
def test_text_that_ceases_to_be_predictable_costs_little(seed: int) -> None:
    gained = simulated(lambda position: float(position < 100), 100, seed)
    assert gained > 2.0
    assert simulated(lambda position: float(position < 100), 2000, seed) >= 0.98


@pytest.mark.parametrize("others", [1, 3, 7])
def test_hopeless_guesses_of_many_replies_do_not_slow_the_others_down(others: int) -> None:
    """Each of them may lose this share, so together they lose it as often as there are replies."""
    speeds = [simulated(always(0.0), 1000, seed, others) for seed in range(4)]
    assert sum(1 / speed - 1 for speed in speeds) / len(speeds) * (others + 1) < 0.03


def test_rows_that_cost_nothing_are_all_used() -> None:
    assert simulated(always(1.0), 1000, cost=lambda rows: 0.02) > 8


def test_rows_that_cost_a_whole_step_each_are_not_used() -> None:
    assert simulated(always(0.9), 1000, cost=lambda rows: 0.02 * rows) >= 0.98


def test_the_first_step_is_plain_and_later_ones_now_and_then() -> None:
    pace = Pace()
    assert pace.wanted() == 0
    pace.record(0, 0, 0.02)
    wanted = []
    for _ in range(200):
        wanted.append(pace.wanted())
        pace.record(wanted[-1], wanted[-1], 0.02)
    assert max(wanted) == COUNTS[-1]
    plain = [number for number, count in enumerate(wanted) if not count]
    assert plain and max(after - before for before, after in zip(plain, plain[1:], strict=False)) <= 20


def test_one_slow_step_does_not_end_speculation() -> None:
    pace = Pace()
    pace.record(0, 0, 0.02)
    for number in range(60):
        count = pace.wanted()
        pace.record(count, count, 2.0 if number == 30 else step_s(1 + count))
    assert max(pace.wanted(), 0) >= 8


@settings(max_examples=200, deadline=None)
@given(data=st.data(), row_cost=st.floats(0.01, ROW_COST), others=st.integers(0, 3))
def test_no_pattern_of_acceptance_loses_more_than_the_ledger_allows(data, row_cost: float, others: int) -> None:
    """Whatever comes true, at any time: in the tokens that plain steps would have given in the same time."""
    pace, lost, done = Pace(), 0.0, 0
    for _ in range(150):
        count = pace.wanted(others)
        accepted = data.draw(st.integers(0, count))
        pace.record(count, accepted, 0.02 * (1 + row_cost * count), others=others)
        lost += row_cost * count * (others + 1) - accepted
        done += 1 + accepted
        assert lost <= START_BALANCE + ALLOWANCE * done + 1e-6


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_measurements_give_one_of_the_counts(data: st.DataObject) -> None:
    pace = Pace()
    for _ in range(30):
        others = data.draw(st.integers(0, 2))
        count = pace.wanted(others)
        assert count in (0, *COUNTS)
        guessed = data.draw(st.integers(0, count))
        accepted = data.draw(st.integers(0, guessed))
        seconds = st.floats(0.0, 10.0)
        pace.record(guessed, accepted, data.draw(seconds), data.draw(seconds), others)
