"""Real quantisers' checkpoints against transformers on the same dequantised weights, for every variant there is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("cache_type, tolerance", [("fp32", 2e-3), ("fp16", 2e-2)])
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_exact_logits_are_those_of_transformers(
    gptq_fixture: Path, variant: Variant, cache_type: str, tolerance: float
) -> None:
    want = expected(gptq_fixture)
    got = logits_at(gptq_fixture, variant, cache_type, want)
    assert np.abs(got.numpy() - want["logits"]).max() <= tolerance


@pytest.mark.parametrize("variant", variants(compute="int8"), ids=str)
def test_int8_logits_diverge_no_more_than_simulated(gptq_fixture: Path, variant: Variant) -> None:
    want = expected(gptq_fixture)
    simulated = json.loads((gptq_fixture / "fixture.json").read_text())["simulated_error"]
    got = logits_at(gptq_fixture, variant, "fp16", want)
    assert mean_kl(want["logits"], got) <= 3 * simulated["q8_block32_activations"]["kl_mean"]


@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_greedy_continuation_is_that_of_transformers(gptq_fixture: Path, variant: Variant) -> None:
    want = expected(gptq_fixture)
    model = variant.load(gptq_fixture, cache_type="fp32")
    cache, ids = model.new_cache(), want["input_ids"].tolist()
    for greedy_id, margin in zip(want["greedy_ids"].tolist(), want["greedy_margin"].tolist(), strict=True):
        if margin < 4e-3:  # twice the tolerance of the logits: the next token is not decided
            break
        cache.truncate(model.reusable_prefix(cache, ids))  # all of it, unless frequencies depend on the length
        logits = model.forward(ids[cache.length :], cache)
        ids.append(int(logits.argmax()))
        assert ids[-1] == greedy_id
