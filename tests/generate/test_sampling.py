"""generate/sampling.py: each definition against transformers, the order of the steps, seeds, and refused settings."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import CheckpointError, RequestError
from ropewalk.generate.sampling import (
    NEVER,
    Sampler,
    SamplingParams,
    apply_bias,
    exclude_top_choices,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_counts,
    penalise_repetition,
    top_logprobs,
)

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
BEFORE_DRY_AND_XTC = [59, 120, 186, 182, 213, 229, 10, 261, 75, 265, 7, 10]  # drawn before there were DRY and XTC


def random_logits(seed: int, size: int = 300, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def frequencies(params: dict, logits: torch.Tensor, draws: int = 4000) -> np.ndarray:
    """How often each token is drawn by one seeded sampler."""
    sampler = Sampler(SamplingParams(seed=5, **params), [])
    return np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=logits.numel()) / draws


@pytest.mark.parametrize(("size", "scale"), [(300, 3.0), (6000, 3.0), (6000, 30.0)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("value", [0.05, 0.5, 0.9, 0.999])
def test_filters_by_probability_keep_what_transformers_keeps(seed: int, value: float, size: int, scale: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(seed, size, scale)
    pairs = [
        (keep_top_p, transformers.TopPLogitsWarper(value)),
        (keep_min_p, transformers.MinPLogitsWarper(value)),
        (keep_typical, transformers.TypicalLogitsWarper(value)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(logits, value), theirs(None, logits[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.01, 0.3])
@pytest.mark.parametrize("value", [0.05, 0.5, 0.9, 0.999])
def test_filters_that_need_most_of_a_large_vocabulary_keep_what_transformers_keeps(value: float, scale: float) -> None:
    """The entropy is summed in another order, which moves the border of `typical` by a token."""
    transformers = pytest.importorskip("transformers")
    logits = random_logits(4, 6000, scale)
    for ours, theirs, most in (
        (keep_top_p, transformers.TopPLogitsWarper(value), 0),
        (keep_typical, transformers.TypicalLogitsWarper(value), 2),
    ):
        kept, expected = ours(logits, value) > NEVER, theirs(None, logits[None])[0] > NEVER
        assert int((kept != expected).sum()) <= most


@pytest.mark.parametrize("k", [1, 5, 299, 300, 1000])
def test_top_k_keeps_what_transformers_keeps_and_equals_of_the_last(k: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(1).round()  # full of equals
    torch.testing.assert_close(keep_top_k(logits, k), transformers.TopKLogitsWarper(k)(None, logits[None])[0])


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    logits, ids = random_logits(2), [3, 7, 7, 299, 0]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None])[0]
    torch.testing.assert_close(penalise_repetition(logits, ids, penalty), theirs)


def test_count_penalties_follow_the_formula_of_the_openai_api() -> None:
    logits = random_logits(3)
    expected = logits.clone()
    expected[4] -= 3 * 0.5 + 0.25
    expected[9] -= 1 * 0.5 + 0.25
    torch.testing.assert_close(penalise_counts(logits, {4: 3, 9: 1}, 0.5, 0.25), expected)


def test_bias_is_added_to_the_logits_it_names_alone() -> None:
    logits = random_logits(4)
    biased = apply_bias(logits, {2: 1.5, 5: NEVER})
    assert biased[2] == logits[2] + 1.5
    assert biased[5] == NEVER
    assert torch.equal(biased[6:], logits[6:])


@pytest.mark.parametrize(
    ("options", "filters"),
    [
        ({"top_k": 20, "top_p": 0.8}, lambda s: keep_top_p(keep_top_k(s, 20), 0.8)),
        ({"top_p": 0.9, "min_p": 0.1}, lambda s: keep_min_p(keep_top_p(s, 0.9), 0.1)),
        ({"top_k": 30, "typical": 0.5}, lambda s: keep_typical(keep_top_k(s, 30), 0.5)),
    ],
)
def test_tokens_are_drawn_by_their_probability_after_the_filters_in_the_documented_order(options, filters) -> None:
    logits = random_logits(6, size=50)
    wanted = torch.softmax(filters(logits / 0.8), dim=-1).numpy()
    found = frequencies({**PLAIN, "temperature": 0.8, **options}, logits)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(wanted))
    # 5 standard deviations of a share of 4000 draws
    assert np.all(np.abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 4000) + 1e-9)


def test_temperature_zero_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([1.0, 7.0, 7.0, -2.0])
    assert Sampler(SamplingParams(temperature=0), []).choose(logits) == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-5, 1e-4])
def test_tiny_temperatures_choose_the_most_likely_token(temperature: float) -> None:
    logits = random_logits(7)
    params = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, seed=1)
    assert Sampler(params, []).choose(logits) == int(logits.argmax())


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(**PLAIN, seed=seed), [])
        return [sampler.choose(random_logits(i)) for i in range(40)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_without_a_seed_two_samplers_differ() -> None:
    samplers = [Sampler(SamplingParams(**PLAIN), []) for _ in range(2)]
    one, two = ([sampler.choose(torch.zeros(1000)) for _ in range(20)] for sampler in samplers)
    assert one != two


def test_drawing_leaves_the_state_of_torch_and_the_logits_alone() -> None:
    logits = random_logits(8)
    before, state = logits.clone(), torch.random.get_rng_state()
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=1.0, logit_bias={0: 1.0}, seed=2)
    Sampler(params, [1, 2]).choose(logits)
    assert torch.equal(logits, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_penalties_see_the_prompt_within_the_range_and_counts_only_the_reply() -> None:
    logits = torch.tensor([2.0, 1.9, 0.0, 0.0])
    greedy = {"temperature": 0}
    assert Sampler(SamplingParams(**greedy, repetition_penalty=2.0), [0, 3]).choose(logits) == 1
    assert Sampler(SamplingParams(**greedy, repetition_penalty=2.0, repetition_range=1), [0, 3]).choose(logits) == 0
    sampler = Sampler(SamplingParams(**greedy, presence_penalty=1.0), [0, 3])
    assert [sampler.choose(logits), sampler.choose(logits)] == [0, 1]


def test_frequency_penalty_grows_with_each_occurrence() -> None:
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=0.6), [])
    assert [sampler.choose(torch.tensor([2.0, 1.0])) for _ in range(5)] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("temperature", [2e-5, 0.7, 100.0])
def test_the_largest_bias_forces_its_token_at_every_temperature(temperature: float) -> None:
    settings = PLAIN | {"logit_bias": {2: 1e30}, "temperature": temperature}
    assert frequencies(settings, torch.tensor([9.0, 0.0, 0.0]), draws=20)[2] == 1


def test_a_banned_token_is_never_drawn() -> None:
    found = frequencies({**PLAIN, "logit_bias": {0: NEVER}}, torch.tensor([9.0, 0.0, 0.0]), draws=200)
    assert found[0] == 0


def test_banning_every_token_is_refused() -> None:
    with pytest.raises(RequestError, match="bans every token"):
        Sampler(SamplingParams(logit_bias={0: NEVER, 1: NEVER}), []).choose(torch.zeros(2))


def test_a_bias_for_an_unknown_token_is_refused() -> None:
    with pytest.raises(RequestError, match="token id 7 is out of range: the model knows 0 to 1"):
        Sampler(SamplingParams(logit_bias={7: 1.0}), []).choose(torch.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        Sampler(SamplingParams(temperature=0), []).choose(torch.tensor([0.0, bad]))


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = random_logits(9)
    logprob, top = top_logprobs(logits, 5, 3)
    exact = torch.log_softmax(logits.double(), dim=-1)
    assert logprob == pytest.approx(float(exact[5]), abs=1e-5)
    assert [token_id for token_id, _ in top] == exact.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("typical", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-39),
        ("repetition_range", 0),
        ("frequency_penalty", math.inf),
        ("presence_penalty", None),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: 1e31}),
        ("logit_bias", {"a": 1.0}),
        ("seed", -1),
        ("seed", 2**63),
        ("max_new_tokens", -1),
        ("stop", [""]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "ab"),
        ("ignore_eos", 1),
        ("logprobs", 101),
        ("dry_multiplier", -0.1),
        ("dry_base", 0.9),
        ("dry_allowed_length", 0),
        ("dry_range", 0),
        ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", {"a": 1}),
        ("xtc_probability", 1.5),
        ("xtc_threshold", math.nan),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be .*got"):
        SamplingParams(**{name: value})


def test_settings_are_frozen_and_normalised() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[3], logit_bias={np.int64(2): 1}, top_p=1)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("END",), (3,), {2: 1.0})
    with pytest.raises(AttributeError):
        params.top_k = 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.01, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    typical=st.floats(0.01, 1),
    penalty=st.floats(0.5, 3),
)
def test_any_combination_draws_a_token_that_the_model_gives_some_probability(
    seed, temperature, top_k, top_p, min_p, typical, penalty
) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical=typical,
        repetition_penalty=penalty, seed=seed,
    )  # fmt: skip
    sampler = Sampler(params, [0, 1, 2])
    for step in range(3):
        assert 0 <= sampler.choose(random_logits(seed + step, size=50)) < 50


def excluded(probabilities: list[float], threshold: float) -> list[int]:
    """XTC in plain Python: of the tokens that reach the threshold, all but the least likely (the last of equals)."""
    top = [i for i, p in enumerate(probabilities) if p >= threshold and p > 0]
    kept = min(top, key=lambda i: (probabilities[i], -i), default=None)
    return [i for i in top if i != kept]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any),
    threshold=st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]),
)
def test_xtc_excludes_what_the_rule_says(weights: list[int], threshold: float) -> None:
    shares = np.float32(weights) / np.float32(sum(weights))
    logits = torch.from_numpy(np.log(shares, where=shares > 0, out=np.full_like(shares, NEVER)))
    probabilities = torch.softmax(logits, dim=-1).tolist()
    found = exclude_top_choices(logits, threshold)
    gone = [i for i in range(len(weights)) if found[i] == NEVER and logits[i] > NEVER]
    assert gone == excluded(probabilities, float(np.float32(threshold)))
    assert [float(found[i]) for i in range(len(weights)) if i not in gone] == [
        float(logits[i]) for i in range(len(weights)) if i not in gone
    ]


def test_xtc_acts_as_often_as_its_probability_says() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    found = frequencies({**PLAIN, "xtc_probability": 0.4, "xtc_threshold": 0.2}, logits)
    without = np.array([0.0, 0.3, 0.15, 0.05]) / 0.5
    wanted = 0.6 * np.array([0.5, 0.3, 0.15, 0.05]) + 0.4 * without
    assert np.all(np.abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 4000))


def test_xtc_looks_at_what_the_other_filters_keep() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    found = frequencies({**PLAIN, "top_k": 2, "xtc_probability": 1.0, "xtc_threshold": 0.1}, logits, draws=100)
    assert found.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_xtc_leaves_temperature_zero_alone() -> None:
    params = SamplingParams(temperature=0, xtc_probability=1.0, xtc_threshold=0.01)
    assert Sampler(params, []).choose(torch.tensor([2.0, 1.0, 0.0])) == 0


@pytest.mark.parametrize("options", [{"xtc_probability": 0.5}, {"dry_multiplier": 0.8}])
def test_with_dry_and_xtc_the_same_seed_draws_the_same_tokens(options: dict) -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(**PLAIN, seed=seed, **options), [1, 2, 1])
        return [sampler.choose(random_logits(i, size=8)) for i in range(60)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_without_dry_and_xtc_a_seed_draws_what_it_always_has() -> None:
    sampler = Sampler(SamplingParams(seed=7, dry_base=2.0, dry_allowed_length=5, xtc_threshold=0.3), [1, 2, 1])
    assert [sampler.choose(random_logits(i)) for i in range(12)] == BEFORE_DRY_AND_XTC


WITHOUT_THREADS = """
import os, sys
import torch
from ropewalk.generate.sampling import Sampler, SamplingParams
from ropewalk.base.unthreaded import copy_

def num_threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
logits = torch.randn(200_000)
before = num_threads()
copy_(torch.empty(2, 200_000)[1], logits)
for options in (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
    {"top_k": 50, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "logit_bias": {3: 1.0}},
    {"top_k": 0, "top_p": 1.0, "typical": 0.9},
    {"dry_multiplier": 0.8},
):
    sampler = Sampler(SamplingParams(seed=1, **options), [5, 6, 7, 5, 6, 7, 5, 6])
    for _ in range(3):
        sampler.choose(logits)
assert num_threads() == before, (num_threads(), before)
logits.mul(2.0)
assert num_threads() > before, "torch did not use threads here either"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_token_of_a_large_vocabulary_is_chosen_without_threads_of_torch() -> None:
    """They would wait for more in busy loops, and take their time from those that compute the next token."""
    subprocess.run([sys.executable, "-c", WITHOUT_THREADS], check=True, timeout=120)
