"""generate/generate.py on a fake model: prefix reuse, ends, cancellation, statistics; and on the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fake_model import FakeModel, reply
from fixtures import allowed_error, gptq_fixture_folders, measured
from ropewalk.base.errors import RequestError
from ropewalk.generate.generate import Generation, GenerationStats
from ropewalk.generate.sampling import SamplingParams
from ropewalk.model.loader import load_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
PROMPT = [5, 6, 7, 8]


def ids_of(steps) -> list[int]:
    return [step.token_id for step in steps]


def greedy_ids(model: FakeModel, prompt: list[int], count: int) -> list[int]:
    """The continuation straight from the definition."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(model.logits(history).argmax()))
    return history[len(prompt) :]


def test_greedy_steps_are_the_most_likely_tokens() -> None:
    model = FakeModel()
    assert ids_of(Generation(model, model.new_cache(), PROMPT, GREEDY)) == greedy_ids(model, PROMPT, 8)


def test_the_last_chosen_token_is_not_forwarded() -> None:
    model = FakeModel()
    cache = model.new_cache()
    steps = ids_of(Generation(model, cache, PROMPT, GREEDY))
    assert model.calls == [PROMPT, *([token] for token in steps[:-1])]
    assert cache.token_ids == PROMPT + steps[:-1]


def test_a_second_turn_computes_only_what_is_new() -> None:
    model = FakeModel()
    cache = model.new_cache()
    steps = ids_of(Generation(model, cache, PROMPT, GREEDY))
    model.calls.clear()
    longer = [*PROMPT, *steps, 1, 2]
    generation = Generation(model, cache, longer, GREEDY)
    assert ids_of(generation) == greedy_ids(model, longer, 8)
    assert model.calls[0] == [steps[-1], 1, 2]
    assert generation.stats.reused_tokens == len(longer) - 3


def test_a_prompt_that_is_cached_whole_is_computed_from_its_last_token() -> None:
    model = FakeModel()
    cache = model.new_cache()
    first = ids_of(Generation(model, cache, PROMPT, GREEDY))
    model.calls.clear()
    assert ids_of(Generation(model, cache, PROMPT, GREEDY)) == first
    assert model.calls[0] == PROMPT[-1:]


def test_a_prompt_that_differs_earlier_drops_the_rest_of_the_cache() -> None:
    model = FakeModel()
    cache = model.new_cache()
    list(Generation(model, cache, PROMPT, GREEDY))
    other = [PROMPT[0], 60, 61]
    generation = Generation(model, cache, other, GREEDY)
    assert ids_of(generation) == greedy_ids(model, other, 8)
    assert generation.stats.reused_tokens == 1


def test_an_end_token_ends_the_reply_and_is_not_a_step() -> None:
    model = FakeModel(script=reply([10, 11, 2, 12], len(PROMPT)))
    generation = Generation(model, model.new_cache(), PROMPT, GREEDY, end_token_ids=[2])
    assert ids_of(generation) == [10, 11]
    assert (generation.finish_reason, generation.end_token_id) == ("stop", 2)
    assert generation.stats.new_tokens == 3


def test_ignore_eos_goes_on_but_stop_token_ids_still_end() -> None:
    model = FakeModel(script=reply([10, 2, 11, 3], len(PROMPT)))
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True, stop_token_ids=[3])
    generation = Generation(model, model.new_cache(), PROMPT, params, end_token_ids=[2])
    assert ids_of(generation) == [10, 2, 11]
    assert generation.end_token_id == 3


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_max_new_tokens_ends_with_length(limit: int) -> None:
    model = FakeModel()
    cache = model.new_cache()
    params = SamplingParams(temperature=0, max_new_tokens=limit)
    generation = Generation(model, cache, PROMPT, params)
    assert len(ids_of(generation)) == limit
    assert generation.finish_reason == "length"
    assert cache.token_ids[: len(PROMPT)] == PROMPT


def test_a_full_context_ends_the_reply_after_its_last_position() -> None:
    model = FakeModel(capacity=10)
    cache = model.new_cache()
    generation = Generation(model, cache, PROMPT, SamplingParams(temperature=0))
    # 4 positions of the prompt, 6 of the reply, and one token chosen at the last position
    assert len(ids_of(generation)) == 7
    assert generation.finish_reason == "context"
    assert (generation.stats.context_used, generation.stats.context_size) == (10, 10)


def test_a_prompt_as_long_as_the_context_gets_one_token() -> None:
    model = FakeModel(capacity=len(PROMPT))
    generation = Generation(model, model.new_cache(), PROMPT, SamplingParams(temperature=0))
    assert len(ids_of(generation)) == 1
    assert generation.finish_reason == "context"


def test_a_prompt_longer_than_the_context_says_by_how_much() -> None:
    model = FakeModel(capacity=3)
    with pytest.raises(RequestError, match=r"has 4 tokens, 1 more than the context of 3: .*max_seq_len="):
        Generation(model, model.new_cache(), PROMPT, GREEDY)
    assert model.calls == []


@pytest.mark.parametrize("prompt", [[], [64], [-1], ["a"], None, [1.5], torch.tensor([[1]])])
def test_wrong_prompts_are_refused_before_anything_runs(prompt: object) -> None:
    model = FakeModel(vocab_size=64)
    with pytest.raises(RequestError):
        Generation(model, model.new_cache(), prompt, GREEDY)
    assert model.calls == []


@pytest.mark.parametrize("convert", [tuple, np.array, torch.tensor])
def test_prompts_may_be_tuples_arrays_and_tensors(convert) -> None:
    model = FakeModel()
    assert ids_of(Generation(model, model.new_cache(), convert(PROMPT), GREEDY)) == greedy_ids(model, PROMPT, 8)


@pytest.mark.parametrize("asked", range(1, 9))
def test_cancelling_ends_soon_and_leaves_a_cache_that_can_be_used(asked: int) -> None:
    model = FakeModel()
    cache = model.new_cache()
    count = 0

    def cancelled() -> bool:
        nonlocal count
        count += 1
        return count >= asked

    generation = Generation(model, cache, PROMPT, GREEDY, cancelled=cancelled)
    steps = ids_of(generation)
    assert generation.finish_reason == "cancelled"
    assert steps == greedy_ids(model, PROMPT, 8)[: len(steps)]
    assert len(steps) < 8
    assert cache.token_ids == (PROMPT + steps)[: cache.length]
    assert ids_of(Generation(model, cache, PROMPT, GREEDY)) == greedy_ids(model, PROMPT, 8)


def test_closing_early_leaves_a_cache_that_can_be_used() -> None:
    model = FakeModel()
    cache = model.new_cache()
    generation = Generation(model, cache, PROMPT, GREEDY)
    next(generation)
    generation.close()
    assert generation.finish_reason == "cancelled"
    assert list(generation) == []
    assert ids_of(Generation(model, cache, PROMPT, GREEDY)) == greedy_ids(model, PROMPT, 8)


def test_progress_counts_the_part_of_the_prompt_that_is_computed() -> None:
    model = FakeModel()
    cache = model.new_cache()
    list(Generation(model, cache, PROMPT[:2], GREEDY))
    calls = []
    list(Generation(model, cache, PROMPT, GREEDY, progress=lambda done, total: calls.append((done, total))))
    assert calls[-1] == (2, 2)


def test_log_probabilities_come_with_the_steps_when_asked() -> None:
    model = FakeModel()
    params = SamplingParams(temperature=0, max_new_tokens=2, logprobs=3, repetition_penalty=2.0)
    steps = list(Generation(model, model.new_cache(), PROMPT, params))
    exact = torch.log_softmax(model.logits(PROMPT), dim=-1)
    assert steps[0].logprob == pytest.approx(float(exact[steps[0].token_id]))
    assert [token_id for token_id, _ in steps[0].top] == exact.topk(3).indices.tolist()
    plain = next(Generation(model, model.new_cache(), PROMPT, GREEDY))
    assert (plain.logprob, plain.top) == (None, ())


def test_the_same_seed_gives_the_same_reply_with_and_without_a_prefix_hit() -> None:
    model = FakeModel()
    params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, seed=9, max_new_tokens=20, repetition_penalty=1.2)
    cache = model.new_cache()
    assert ids_of(Generation(model, cache, PROMPT, params)) == ids_of(Generation(model, cache, PROMPT, params))


def test_statistics_of_a_finished_reply_stay_as_they_were() -> None:
    model = FakeModel()
    cache = model.new_cache()
    generation = Generation(model, cache, PROMPT, GREEDY)
    list(generation)
    before = generation.stats
    assert before.context_used == len(PROMPT) + 7
    list(Generation(model, cache, [1], SamplingParams(max_new_tokens=1)))
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
def test_greedy_tokens_of_a_fixture_are_those_of_transformers(folder: Path) -> None:
    if measured(folder, "min_greedy_margin") < 2 * allowed_error(folder, "fp32").most:
        pytest.skip("two tokens are too close for equality to be required")
    expected = np.load(folder / "expected.npz")
    model = load_model(folder, compute="exact", backend="reference", cache_type="fp32")
    params = SamplingParams(temperature=0, max_new_tokens=len(expected["greedy_ids"]))
    cache = model.new_cache()
    prompt = expected["input_ids"].tolist()
    assert ids_of(Generation(model, cache, prompt, params)) == expected["greedy_ids"].tolist()
    again = Generation(model, cache, prompt, params)
    assert ids_of(again) == expected["greedy_ids"].tolist()
    assert again.stats.reused_tokens == len(prompt) - 1
