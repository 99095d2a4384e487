"""Real quantisers' checkpoints against transformers on the same dequantised weights, for every variant there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from accuracy import FACTOR, assert_error, error_of, size_of
from fixtures import allowed_error, measured
from variants import Variant, variants

CHUNK = 64  # most prompts of the fixtures are longer: chunks meet the cache


def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def logits_at(folder: Path, variant: Variant, cache_type: str, want: dict[str, np.ndarray]) -> torch.Tensor:
    model = variant.load(folder, cache_type=cache_type, max_input_len=CHUNK)
    logits = model.forward(want["input_ids"].tolist(), model.new_cache(), logits="all")
    return logits[torch.from_numpy(want["logits_positions"])]  # [P, V]


def mean_kl(want: np.ndarray, got: torch.Tensor) -> float:
    """Mean over rows of KL(softmax(want) || softmax(got)), in float64."""
    p, q = (torch.log_softmax(torch.as_tensor(rows, dtype=torch.float64), -1) for rows in (want, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("cache_type", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_exact_logits_are_those_of_transformers(gptq_fixture: Path, variant: Variant, cache_type: str) -> None:
    want = expected(gptq_fixture)
    got = logits_at(gptq_fixture, variant, cache_type, want)
    assert_error(error_of(got, want["logits"]), allowed_error(gptq_fixture, cache_type), size_of(want["logits"]), 1)


@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_logits_diverge_no_more_than_simulated(gptq_fixture: Path, variant: Variant) -> None:
    want = expected(gptq_fixture)
    got = logits_at(gptq_fixture, variant, "fp16", want)
    simulated = measured(gptq_fixture, "simulated_error", "q8_block32_activations", "kl_mean")
    assert mean_kl(want["logits"], got) <= FACTOR * simulated


@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_greedy_continuation_is_that_of_transformers(gptq_fixture: Path, variant: Variant) -> None:
    want = expected(gptq_fixture)
    model = variant.load(gptq_fixture, cache_type="fp32")
    cache, ids = model.new_cache(), want["input_ids"].tolist()
    for greedy_id, margin in zip(want["greedy_ids"].tolist(), want["greedy_margin"].tolist(), strict=True):
        if margin < 2 * allowed_error(gptq_fixture, "fp32").most:  # the next token is not decided
            break
        cache.truncate(model.reusable_prefix(cache, ids))  # all of it, unless frequencies depend on the length
        logits = model.forward(ids[cache.length :], cache)
        ids.append(int(logits.argmax()))
        assert ids[-1] == greedy_id
