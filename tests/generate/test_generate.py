"""generate/generate.py on a fake model: prefix reuse, ends, cancellation, statistics; and on the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_model import FakeModel, reply
from fixtures import allowed_error, gptq_fixture_folders, measured
from ropewalk.base.errors import RequestError
from ropewalk.generate.generate import Generation, GenerationStats
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Sequence
from ropewalk.model.loader import load_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def opened() -> Iterator[Callable[..., Sequence]]:
    """Sequences of models, one at a time: opening the next one ends the one before."""
    schedulers: dict[int, Scheduler] = {}
    with ExitStack() as stack:

        def open_(model, prompt=PROMPT, adapters=None) -> Sequence:
            stack.close()
            scheduler = schedulers.setdefault(id(model), Scheduler(model))
            return stack.enter_context(scheduler.open(prompt, adapters))

        yield open_


def ids_of(steps) -> list[int]:
    return [step.token_id for step in steps]


def greedy_ids(model: FakeModel, prompt: list[int], count: int) -> list[int]:
    """The continuation straight from the definition."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(model.logits(history).argmax()))
    return history[len(prompt) :]


def test_greedy_steps_are_the_most_likely_tokens(opened) -> None:
    model = FakeModel()
    assert ids_of(Generation(opened(model), GREEDY)) == greedy_ids(model, PROMPT, 8)


def test_the_last_chosen_token_is_not_forwarded(opened) -> None:
    model = FakeModel()
    sequence = opened(model)
    steps = ids_of(Generation(sequence, GREEDY))
    assert model.calls == [PROMPT, *([token] for token in steps[:-1])]
    assert sequence.token_ids == PROMPT + steps[:-1]


def test_a_second_turn_computes_only_what_is_new(opened) -> None:
    model = FakeModel()
    steps = ids_of(Generation(opened(model), GREEDY))
    model.calls.clear()
    longer = [*PROMPT, *steps, 1, 2]
    generation = Generation(opened(model, longer), GREEDY)
    assert ids_of(generation) == greedy_ids(model, longer, 8)
    assert model.calls[0] == [steps[-1], 1, 2]
    assert generation.stats.reused_tokens == len(longer) - 3


def test_a_prompt_that_is_cached_whole_is_computed_from_its_last_token(opened) -> None:
    model = FakeModel()
    first = ids_of(Generation(opened(model), GREEDY))
    model.calls.clear()
    assert ids_of(Generation(opened(model), GREEDY)) == first
    assert model.calls[0] == PROMPT[-1:]


def test_a_prompt_that_differs_earlier_drops_the_rest_of_the_cache(opened) -> None:
    model = FakeModel()
    list(Generation(opened(model), GREEDY))
    other = [PROMPT[0], 60, 61]
    generation = Generation(opened(model, other), GREEDY)
    assert ids_of(generation) == greedy_ids(model, other, 8)
    assert generation.stats.reused_tokens == 1


def test_an_end_token_ends_the_reply_and_is_not_a_step(opened) -> None:
    model = FakeModel(script=reply([10, 11, 2, 12], len(PROMPT)))
    generation = Generation(opened(model), GREEDY, end_token_ids=[2])
    assert ids_of(generation) == [10, 11]
    assert (generation.finish_reason, generation.end_token_id) == ("stop", 2)
    assert generation.stats.new_tokens == 3


def test_ignore_eos_goes_on_but_stop_token_ids_still_end(opened) -> None:
    model = FakeModel(script=reply([10, 2, 11, 3], len(PROMPT)))
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True, stop_token_ids=[3])
    generation = Generation(opened(model), params, end_token_ids=[2])
    assert ids_of(generation) == [10, 2, 11]
    assert generation.end_token_id == 3


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_max_new_tokens_ends_with_length(limit: int, opened) -> None:
    model = FakeModel()
    params = SamplingParams(temperature=0, max_new_tokens=limit)
    sequence = opened(model)
    generation = Generation(sequence, params)
    assert len(ids_of(generation)) == limit
    assert generation.finish_reason == "length"
    assert sequence.token_ids[: len(PROMPT)] == PROMPT


def test_a_full_context_ends_the_reply_after_its_last_position(opened) -> None:
    model = FakeModel(capacity=10)
    generation = Generation(opened(model), SamplingParams(temperature=0))
    # 4 positions of the prompt, 6 of the reply, and one token chosen at the last position
    assert len(ids_of(generation)) == 7
    assert generation.finish_reason == "context"
    assert (generation.stats.context_used, generation.stats.context_size) == (10, 10)


def test_a_prompt_as_long_as_the_context_gets_one_token(opened) -> None:
    model = FakeModel(capacity=len(PROMPT))
    generation = Generation(opened(model), SamplingParams(temperature=0))
    assert len(ids_of(generation)) == 1
    assert generation.finish_reason == "context"


def test_a_prompt_longer_than_the_context_says_by_how_much(opened) -> None:
    model = FakeModel(capacity=3)
    with pytest.raises(RequestError, match=r"has 4 tokens, 1 more than the context of 3: .*max_seq_len="):
        Generation(opened(model), GREEDY)
    assert model.calls == []


@pytest.mark.parametrize("prompt", [[], [64], [-1], ["a"], None, [1.5], torch.tensor([[1]])])
def test_wrong_prompts_are_refused_before_anything_runs(prompt: object, opened) -> None:
    model = FakeModel(vocab_size=64)
    with pytest.raises(RequestError):
        Generation(opened(model, prompt), GREEDY)
    assert model.calls == []


@pytest.mark.parametrize("convert", [tuple, np.array, torch.tensor])
def test_prompts_may_be_tuples_arrays_and_tensors(convert, opened) -> None:
    model = FakeModel()
    assert ids_of(Generation(opened(model, convert(PROMPT)), GREEDY)) == greedy_ids(model, PROMPT, 8)


@pytest.mark.parametrize("asked", range(1, 9))
def test_cancelling_ends_soon_and_leaves_a_cache_that_can_be_used(asked: int, opened) -> None:
    model = FakeModel()
    count = 0

    def cancelled() -> bool:
        nonlocal count
        count += 1
        return count >= asked

    sequence = opened(model)
    generation = Generation(sequence, GREEDY, cancelled=cancelled)
    steps = ids_of(generation)
    assert generation.finish_reason == "cancelled"
    assert steps == greedy_ids(model, PROMPT, 8)[: len(steps)]
    assert len(steps) < 8
    assert sequence.token_ids == (PROMPT + steps)[: sequence.length]
    assert ids_of(Generation(opened(model), GREEDY)) == greedy_ids(model, PROMPT, 8)


def test_closing_early_leaves_a_cache_that_can_be_used(opened) -> None:
    model = FakeModel()
    generation = Generation(opened(model), GREEDY)
    next(generation)
    generation.close()
    assert generation.finish_reason == "cancelled"
    assert list(generation) == []
    assert ids_of(Generation(opened(model), GREEDY)) == greedy_ids(model, PROMPT, 8)


def test_progress_counts_the_part_of_the_prompt_that_is_computed(opened) -> None:
    model = FakeModel()
    list(Generation(opened(model, PROMPT[:2]), GREEDY))
    calls = []
    list(Generation(opened(model), GREEDY, progress=lambda done, total: calls.append((done, total))))
    assert calls[-1] == (2, 2)


def test_log_probabilities_come_with_the_steps_when_asked(opened) -> None:
    model = FakeModel()
    params = SamplingParams(temperature=0, max_new_tokens=2, logprobs=3, repetition_penalty=2.0)
    steps = list(Generation(opened(model), params))
    exact = torch.log_softmax(model.logits(PROMPT), dim=-1)
    assert steps[0].logprob == pytest.approx(float(exact[steps[0].token_id]))
    assert [token_id for token_id, _ in steps[0].top] == exact.topk(3).indices.tolist()
    plain = next(Generation(opened(model), GREEDY))
    assert (plain.logprob, plain.top) == (None, ())


def test_the_same_seed_gives_the_same_reply_with_and_without_a_prefix_hit(opened) -> None:
    model = FakeModel()
    params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, seed=9, max_new_tokens=20, repetition_penalty=1.2)
    assert ids_of(Generation(opened(model), params)) == ids_of(Generation(opened(model), params))


def test_statistics_of_a_finished_reply_stay_as_they_were(opened) -> None:
    model = FakeModel()
    generation = Generation(opened(model), GREEDY)
    list(generation)
    before = generation.stats
    assert before.context_used == len(PROMPT) + 7
    list(Generation(opened(model, [1]), SamplingParams(max_new_tokens=1)))
    assert generation.stats == before


def test_statistics_speak_of_what_was_computed() -> None:
    stats = GenerationStats(
        prompt_tokens=100, reused_tokens=60, prompt_s=2.0, new_tokens=11, generation_s=5.0, context_used=110,
        context_size=256,
    )  # fmt: skip
    assert stats.prompt_tokens_per_s == 20.0
    assert stats.new_tokens_per_s == 2.0
    assert stats.describe() == (
        "prompt 100 tokens (60 reused), 20.0 tokens/s; new 11 tokens, 2.0 tokens/s; context 110 of 256"
    )
    empty = GenerationStats(1, 0, 0.0, 0, 0.0, 0, 1)
    assert (empty.prompt_tokens_per_s, empty.new_tokens_per_s) == (0.0, 0.0)


@pytest.mark.parametrize("folder", gptq_fixture_folders()[:4], ids=lambda folder: folder.name)
def test_greedy_tokens_of_a_fixture_are_those_of_transformers(folder: Path, opened) -> None:
    if measured(folder, "min_greedy_margin") < 2 * allowed_error(folder, "fp32").most:
        pytest.skip("two tokens are too close for equality to be required")
    expected = np.load(folder / "expected.npz")
    model = load_model(folder, compute="exact", backend="reference", cache_type="fp32")
    params = SamplingParams(temperature=0, max_new_tokens=len(expected["greedy_ids"]))
    prompt = expected["input_ids"].tolist()
    assert ids_of(Generation(opened(model, prompt), params)) == expected["greedy_ids"].tolist()
    again = Generation(opened(model, prompt), params)
    assert ids_of(again) == expected["greedy_ids"].tolist()
    assert again.stats.reused_tokens == len(prompt) - 1
