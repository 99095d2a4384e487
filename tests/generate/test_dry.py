"""generate/dry.py, against the rule written out in plain Python."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.generate.dry import MAX_PENALTY, DryPenalty, NoBreakers, common_endings, penalise_repeats
from ropewalk.generate.sampling import Sampler, SamplingParams

GREEDY = {"temperature": 0, "dry_multiplier": 1.0}


class TokenBreakers:
    """These sequences of tokens are breakers."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [list(sequence) for sequence in sequences]

    def is_breaker(self, token_id: int) -> bool:
        return [token_id] in self.sequences

    def end_in_last(self, token_ids: Sequence[int]) -> bool:
        return any(list(token_ids)[-len(sequence) :] == sequence for sequence in self.sequences)


def by_the_rule(
    ids: Sequence[int], multiplier: float, base: float, allowed: int, span: int | None, breakers: TokenBreakers
) -> dict[int, float]:
    """The published rule, place by place."""
    ids = list(ids) if span is None else list(ids)[-span:]
    longest: dict[int, int] = {}
    for place in range(len(ids) - 1):
        length = 0
        while length <= place and ids[place - length] == ids[len(ids) - 1 - length]:
            if breakers.end_in_last(ids[: len(ids) - length]):
                break
            length += 1
        following = ids[place + 1]
        if length and not breakers.is_breaker(following):
            longest[following] = max(longest.get(following, 0), length)
    return {token: multiplier * base ** (m - allowed) for token, m in longest.items() if m >= allowed}


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 3), max_size=40),
    reply=st.lists(st.integers(0, 3), max_size=25),
    multiplier=st.floats(0.1, 3),
    base=st.floats(1, 2),
    allowed=st.integers(1, 4),
    span=st.none() | st.integers(1, 20),
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2),
)
def test_penalties_are_those_of_the_published_rule_after_every_token(
    prompt, reply, multiplier, base, allowed, span, sequences
) -> None:
    breakers = TokenBreakers(sequences)
    dry = DryPenalty(multiplier, base, allowed, span, breakers, prompt)
    for end in range(len(reply) + 1):
        expected = by_the_rule(prompt + reply[:end], multiplier, base, allowed, span, breakers)
        assert dry.penalties() == pytest.approx(expected, rel=1e-12)
        if end < len(reply):
            dry.append(reply[end])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60))
def test_common_endings_are_counted_as_by_hand(ids: list[int]) -> None:
    def common(place: int) -> int:
        length = 0
        while length <= place and ids[place - length] == ids[len(ids) - 1 - length]:
            length += 1
        return length

    assert common_endings(ids).tolist() == [common(place) for place in range(len(ids) - 1)]


def test_the_example_of_its_author() -> None:
    """In a b c d, something else, a b c: d followed a copy of three tokens, so it costs 0.8 * 1.75 ** (3 - 2)."""
    dry = DryPenalty(0.8, 1.75, 2, None, NoBreakers(), [1, 2, 3, 4, 9, 1, 2, 3])
    assert dry.penalties() == {4: pytest.approx(0.8 * 1.75)}


def test_a_long_repetition_leaves_the_logits_finite() -> None:
    dry = DryPenalty(100.0, 100.0, 1, None, NoBreakers(), [5] * 1000)
    assert dry.penalties() == {5: MAX_PENALTY}
    assert torch.isfinite(penalise_repeats(torch.zeros(8), dry.penalties())).all()


def test_without_a_repetition_logits_stay_as_they_are() -> None:
    logits = torch.randn(8)
    assert torch.equal(penalise_repeats(logits, {}), logits)


def test_a_loop_is_left_and_without_the_penalty_it_is_not() -> None:
    def write(**options) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=0, **options), [1, 2, 3, 4, 1, 2, 3, 4])
        out = []
        for _ in range(12):
            logits = torch.zeros(6)
            logits[1 + len(out) % 4] = 3.0  # the model goes round and round
            out.append(sampler.choose(logits))
        return out

    assert write() == [1, 2, 3, 4] * 3
    assert write(dry_multiplier=0.8) != [1, 2, 3, 4] * 3
    assert write(dry_multiplier=0.8, dry_allowed_length=100) == [1, 2, 3, 4] * 3


def test_the_sampler_takes_the_penalty_from_the_logits_before_the_temperature() -> None:
    prompt = [1, 2, 3, 1, 2]
    logits = torch.zeros(5)
    logits[3], logits[4] = 2.0, 1.5
    assert Sampler(SamplingParams(temperature=0), prompt).choose(logits) == 3
    assert Sampler(SamplingParams(**GREEDY), prompt).choose(logits) == 4
    assert Sampler(SamplingParams(**GREEDY, dry_range=3), prompt).choose(logits) == 3
    assert Sampler(SamplingParams(**GREEDY), prompt, TokenBreakers([[2]])).choose(logits) == 3
    assert Sampler(SamplingParams(**GREEDY), prompt, TokenBreakers([[3]])).choose(logits) == 3


def test_a_token_costs_little_beside_a_long_context() -> None:
    ids = np.random.default_rng(0).integers(0, 50, 60_000).tolist()
    dry = DryPenalty(0.8, 1.75, 2, None, NoBreakers(), ids)
    started = time.process_time()
    for token_id in ids[:50]:
        dry.append(token_id)
        dry.penalties()
    assert (time.process_time() - started) / 50 < 0.05  # a search place by place would take seconds
