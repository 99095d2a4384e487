"""generate/speculation.py: guesses against their definitions, and drafts that keep up with the sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_model import FakeModel, reply
from lone_sequence import LoneSequence
from ropewalk.base.errors import ConfigError
from ropewalk.generate.generate import Generation
from ropewalk.generate.guesses import Guesses
from ropewalk.generate.pace import Pace
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.speculation import (
    DraftGuesser,
    Guesser,
    NgramGuesser,
    Vocabulary,
    check_same_vocabulary,
)

FEW_TOKENS = st.lists(st.integers(0, 3), max_size=80)


def match_length(tokens: Sequence[int], place: int, longest: int) -> int:
    """How many tokens before `place` are the last ones, straight from the definition."""
    sizes = range(min(longest, place) + 1)
    return max(size for size in sizes if tokens[place - size : place] == tokens[len(tokens) - size :])


def looked_up(tokens: list[int], count: int, shortest: int, longest: int, most_places: int, oldest: int) -> list[int]:
    """The guess by trying every place."""
    lengths = {place: match_length(tokens, place, longest) for place in range(shortest, len(tokens))}
    places = [place for place in sorted(lengths, reverse=True) if lengths[place] >= shortest and place >= oldest]
    if not places:
        return []
    best = max(places[:most_places], key=lambda place: lengths[place])  # the first of equals is the most recent
    sequence = list(tokens)
    for number in range(count):
        sequence.append(sequence[best + number])
    return sequence[len(tokens) :]


@settings(max_examples=300, deadline=None)
@given(
    tokens=FEW_TOKENS,
    count=st.integers(0, 9),
    shortest=st.integers(1, 4),
    more=st.integers(0, 6),
    most_places=st.integers(1, 12),
)
def test_an_ngram_guess_is_what_a_search_of_the_whole_sequence_finds(
    tokens: list[int], count: int, shortest: int, more: int, most_places: int
) -> None:
    guesser = NgramGuesser(shortest, shortest + more, most_places)
    for end in range(len(tokens) + 1):
        expected = looked_up(tokens[:end], count, shortest, shortest + more, most_places, 0)
        assert guesser.guess(tokens[:end], count) == expected


@settings(max_examples=100, deadline=None)
@given(tokens=FEW_TOKENS, starts=st.lists(st.integers(0, 80), max_size=6))
def test_an_ngram_guess_does_not_depend_on_the_guesses_before(tokens: list[int], starts: list[int]) -> None:
    guesser = NgramGuesser(shortest=2)
    for end in sorted(start for start in starts if start < len(tokens)):
        guesser.guess(tokens[:end], 3)
    guesser.read(tokens)
    assert guesser.guess(tokens, 5) == NgramGuesser(shortest=2).guess(tokens, 5)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=20, max_size=120))
def test_an_ngram_guess_with_little_memory_is_one_of_the_recent_places(tokens: list[int]) -> None:
    window = 8
    guesser = NgramGuesser(shortest=2, longest=4, most_places=100, window=window)
    for end in range(1, len(tokens) + 1):
        found = guesser.guess(tokens[:end], 4)
        oldest_places = range(end - 2 * window, end - window + 1)
        expected = [looked_up(tokens[:end], 4, 2, 4, 100, oldest) for oldest in oldest_places]
        assert found in expected


def test_what_an_ngram_guesser_remembers_is_bounded() -> None:
    guesser = NgramGuesser(window=100)
    tokens = [number * 7919 % 65536 for number in range(5000)]
    for end in range(0, 5000, 50):
        guesser.guess(tokens[:end], 4)
    assert len(guesser._before) <= 250 and len(guesser._newest) <= 250


def test_an_ngram_guess_goes_round_a_loop() -> None:
    assert NgramGuesser().guess([9, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_an_ngram_guess_prefers_the_longest_match_to_the_most_recent() -> None:
    tokens = [8, 1, 2, 3, 40, 9, 1, 2, 3, 50, 8, 1, 2, 3]
    assert NgramGuesser().guess(tokens, 1) == [40]
    assert NgramGuesser().guess([*tokens[:-4], 7, 1, 2, 3], 1) == [50]


def test_an_ngram_guesser_starts_anew_with_a_shorter_sequence() -> None:
    guesser = NgramGuesser()
    guesser.read([1, 2, 3, 4, 1, 2, 3])
    assert guesser.guess([5, 6, 7, 8, 5, 6, 7][:6], 2) == []
    assert guesser.guess([5, 6, 7, 8, 5, 6, 7], 2) == [8, 5]


def drafting(script: Callable[[list[int]], int | None], capacity: int = 128) -> tuple[DraftGuesser, FakeModel]:
    model = FakeModel(script=script, capacity=capacity)
    return DraftGuesser(LoneSequence(model)), model


def test_a_draft_guesses_what_the_smaller_model_finds_most_likely() -> None:
    guesser, model = drafting(reply([10, 11, 12, 13], prompt_length=3))
    assert guesser.guess([1, 2, 3], 4) == [10, 11, 12, 13]
    assert model.calls == [[1, 2, 3], [10], [11], [12]]


def test_a_draft_computes_only_what_came_otherwise() -> None:
    guesser, model = drafting(lambda history: len(history))
    assert guesser.guess([50, 51], 4) == [2, 3, 4, 5]
    model.calls.clear()
    assert guesser.guess([50, 51, 2, 3, 60], 2) == [5, 6]  # two came true, and then another token
    assert model.calls == [[60], [5]]
    model.calls.clear()
    assert guesser.guess([50, 51, 2, 3, 60, 5, 6, 61], 1) == [8]  # all came true; the last had not been computed
    assert model.calls == [[6, 61]]


def test_a_draft_reads_a_prompt_ahead() -> None:
    guesser, model = drafting(lambda history: len(history))
    guesser.read([50, 51, 52])
    assert model.calls == [[50, 51]]
    assert guesser.guess([50, 51, 52, 53], 1) == [4]
    assert model.calls == [[50, 51], [52, 53]]


def test_a_draft_follows_a_sequence_whose_beginning_was_already_computed() -> None:
    model = FakeModel(script=lambda history: len(history))
    draft = LoneSequence(model)
    draft.forward([50, 51])
    model.calls.clear()
    assert DraftGuesser(draft).guess([50, 51, 52], 2) == [3, 4]
    assert model.calls == [[52], [3]]


def test_a_draft_guesses_nothing_beyond_its_own_context() -> None:
    guesser, _ = drafting(lambda history: len(history), capacity=6)
    assert guesser.guess([1, 2, 3, 4, 5], 4) == [5, 6]
    assert guesser.guess([1, 2, 3, 4, 5, 6], 4) == [6]
    assert guesser.guess([1, 2, 3, 4, 5, 6, 7], 4) == []
    guesser.read([1, 2, 3, 4, 5, 6, 7, 8])


class _CancelledOnce(LoneSequence):
    """A sequence whose second call ends within its rows."""

    calls = 0

    def forward(self, token_ids: Sequence[int], logits: str = "last"):
        self.calls += 1
        if self.calls != 2:
            return super().forward(token_ids, logits)
        super().forward(token_ids[:1], "none")
        return None


def test_a_draft_that_was_cancelled_goes_on_from_what_it_has() -> None:
    model = FakeModel(script=lambda history: len(history))
    guesser = DraftGuesser(_CancelledOnce(model))
    assert guesser.guess([50, 51], 1) == [2]
    assert guesser.guess([50, 51, 60, 61, 62], 3) == []
    model.calls.clear()
    assert guesser.guess([50, 51, 60, 61, 62], 2) == [5, 6]
    assert model.calls == [[61, 62], [5]]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_drafts_guesses_do_not_depend_on_its_earlier_ones(data: st.DataObject) -> None:
    model, fresh_model = FakeModel(vocab_size=3), FakeModel(vocab_size=3)
    guesser, tokens = DraftGuesser(LoneSequence(model)), [1, 2]
    for _ in range(8):
        count = data.draw(st.integers(0, 4))
        guess = guesser.guess(tokens, count)
        assert guess == DraftGuesser(LoneSequence(fresh_model)).guess(tokens, count)
        right = data.draw(st.integers(0, len(guess)))
        tokens += [*guess[:right], data.draw(st.integers(0, 2))]


@pytest.mark.parametrize("guesser", [NgramGuesser(), DraftGuesser(LoneSequence(FakeModel()))])
def test_no_guess_is_made_where_none_is_wanted(guesser: Guesser) -> None:
    assert guesser.guess([1, 2, 3, 1, 2, 3], 0) == []


SPECIAL, SAMPLES = {"<s>": 1, "</s>": 2}, {0: b"a", 500: b" the"}
TARGET = Vocabulary("big", 32000, 32000, SPECIAL, SAMPLES)


def test_a_draft_model_with_the_same_vocabulary_is_accepted() -> None:
    check_same_vocabulary(TARGET, Vocabulary("small", 32000, 32000, {"</s>": 2, "<s>": 1}, SAMPLES))


def test_tables_may_be_padded_to_different_sizes() -> None:
    big = Vocabulary("big", 152064, 151643, SPECIAL, SAMPLES)
    check_same_vocabulary(big, Vocabulary("small", 151936, 151643, SPECIAL, SAMPLES))


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Vocabulary("small", 32016, 32016, SPECIAL, SAMPLES), "small knows 32016 tokens, big knows 32000"),
        (Vocabulary("small", 31000, 32000, SPECIAL, SAMPLES), "small knows 31000 tokens, big knows 32000"),
        (Vocabulary("small", 32000, 32000, SPECIAL, {500: b"the"}), "token 500 is b'the' in small and b' the' in big"),
        (Vocabulary("small", 32000, 32000, {"<s>": 1, "</s>": 7}, {}), "'</s>' is 7 in small and 2 in big"),
        (Vocabulary("small", 32000, 32000, {"<s>": 1}, {}), "'</s>' is missing in small and 2 in big"),
        (Vocabulary("small", 32000, 32000, {**SPECIAL, "<x>": 9}, {}), "'<x>' is 9 in small and missing in big"),
    ],
)
def test_a_draft_model_with_another_vocabulary_is_refused_by_name(draft: Vocabulary, message: str) -> None:
    with pytest.raises(ConfigError, match="^draft_model: .*a draft model needs the same tokenizer") as refused:
        check_same_vocabulary(TARGET, draft)
    assert message in str(refused.value)


def test_a_draft_model_does_not_guess_after_tokens_that_it_has_no_row_for() -> None:
    guesser = DraftGuesser(LoneSequence(FakeModel(vocab_size=40)))
    guesser.read([1, 2, 50])
    assert guesser.guess([1, 2, 50], 3) == []
    assert len(guesser.guess([1, 2, 3], 3)) == 3


def test_guesses_that_the_model_has_no_row_for_are_not_checked(monkeypatch) -> None:
    monkeypatch.setattr(Pace, "wanted", lambda pace, num_others: 4)
    guesses = Guesses(DraftGuesser(LoneSequence(FakeModel(vocab_size=200))))
    params = SamplingParams(temperature=0, max_new_tokens=60, ignore_eos=True)
    texts = []
    for guessing in (None, guesses):
        with Scheduler(FakeModel(vocab_size=64)).open([5, 6, 7]) as sequence:
            texts.append([step.token_id for step in Generation(sequence, params, guesses=guessing)])
    assert texts[0] == texts[1]
