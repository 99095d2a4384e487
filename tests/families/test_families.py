"""Tiny random models of every family: the same logits as transformers, however a sequence is cut into calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from accuracy import assert_as_accurate
from gptq_writer import write_checkpoint
from ropewalk.model.model import Model
from transformers_model import Logits, their_logits
from variants import Variant, variants

NUM_TOKENS = 100
CHUNKS = (1, 7, 64, 2048)


@dataclass(frozen=True)
class Family:
    """A kind of model: arguments of `write_checkpoint`."""

    name: str
    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
UPPER_LAYER_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
FAMILIES = [
    Family("llama-dense", "llama", {}, {"dense": True}),
    Family("llama-dense-bf16-tied", "llama", {"tie_word_embeddings": True}, {"dense": True, "dtype": torch.bfloat16}),
    Family("llama-gptq-act-order", "llama", {}, {"desc_act": True, "sym": False}),
    Family("llama-gptq-8bit-head", "llama", {}, {"bits": 8, "quantised_lm_head": True}),
    Family("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}, {"bits": 3, "group_size": 32}),
    Family("llama-llama3-rope", "llama", {"rope_scaling": LLAMA3_ROPE}, {"desc_act": True}),
    Family("mistral-dense-window", "mistral", {"sliding_window": 32}, {"dense": True}),
    Family("mistral-gptq-window", "mistral", {"sliding_window": 17}, {"desc_act": True}),
    Family("qwen2-dense", "qwen2", {}, {"dense": True}),
    Family("qwen2-gptq", "qwen2", {}, {"format": "gptq_v2", "sym": False}),
    Family("qwen2-window-above", "qwen2", UPPER_LAYER_WINDOW, {"dense": True}),
    Family("qwen3-dense", "qwen3", {}, {"dense": True}),
    Family("qwen3-gptq", "qwen3", {}, {"desc_act": True, "group_size": -1}),
]


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0, 6.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LENGTH_DEPENDENT = [
    Family(
        "dynamic", "llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}
    ),
    Family("longrope", "llama", {"rope_scaling": LONGROPE}),
]


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk, token ids, and what transformers says about them."""

    folder: Path
    token_ids: list[int]  # [T]
    logits: Logits
    edited_ids: list[int]  # the same up to EDIT_POS, then others
    edited_logits: Logits


EDIT_POS = 41


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family.name)
    exact = write_checkpoint(folder, family.overrides, family=family.family, **family.options)
    generator = torch.Generator().manual_seed(7)
    first, second = torch.randint(0, 128, (2, NUM_TOKENS), generator=generator).tolist()
    second[:EDIT_POS] = first[:EDIT_POS]
    return Case(folder, first, their_logits(folder, exact, first), second, their_logits(folder, exact, second))


def whole(model: Model, ids: list[int]) -> torch.Tensor:
    return model.forward(ids, model.new_cache(), logits="all")


def prefill_then_decode(model: Model, ids: list[int], prompt_tokens: int) -> torch.Tensor:
    cache = model.new_cache()
    rows = [model.forward(ids[:prompt_tokens], cache, logits="all")]
    rows += [model.forward([token_id], cache) for token_id in ids[prompt_tokens:]]
    return torch.cat(rows)  # [T, V]


def edited_after(model: Model, ids: list[int], edited_ids: list[int]) -> torch.Tensor:
    """Run `ids`, then what of `edited_ids` the cache does not hold; logits of the last rows."""
    cache = model.new_cache()
    model.forward(ids, cache, logits="none")
    kept = model.reusable_prefix(cache, edited_ids)
    assert kept == EDIT_POS
    cache.truncate(kept)
    return model.forward(edited_ids[kept:], cache, logits="all")  # [T - EDIT_POS, V]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_logits_are_those_of_transformers_for_any_chunk(case: Case, variant: Variant, chunk: int) -> None:
    model = variant.load(case.folder, cache_type="fp32", max_input_len=chunk)
    assert_as_accurate(whole(model, case.token_ids), *case.logits)


@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_decoding_and_continuing_after_a_prefix_hit_agree_with_transformers(case: Case, variant: Variant) -> None:
    model = variant.load(case.folder, cache_type="fp32", max_input_len=64)
    assert_as_accurate(prefill_then_decode(model, case.token_ids, 70), *case.logits)
    edited = edited_after(model, case.token_ids, case.edited_ids)
    assert_as_accurate(edited, *case.edited_logits.from_row(EDIT_POS))


@pytest.mark.parametrize("variant", variants(backend="cpu"), ids=str)
def test_logits_are_bit_identical_however_the_sequence_is_cut(case: Case, variant: Variant) -> None:
    models = [variant.load(case.folder, max_input_len=chunk) for chunk in CHUNKS]
    logits = whole(models[-1], case.token_ids)
    for model in models[:-1]:
        assert torch.equal(whole(model, case.token_ids), logits)
    assert torch.equal(prefill_then_decode(models[1], case.token_ids, 70), logits)
    edited = whole(models[-1], case.edited_ids)
    assert torch.equal(edited_after(models[2], case.token_ids, case.edited_ids), edited[EDIT_POS:])


@pytest.mark.parametrize("num_tokens", [60, 64, 65, NUM_TOKENS])
@pytest.mark.parametrize("family", LENGTH_DEPENDENT, ids=str)
@pytest.mark.parametrize("variant", variants(compute="exact"), ids=str)
def test_frequencies_that_depend_on_the_length_are_those_of_the_whole_prompt(
    tmp_path: Path, variant: Variant, family: Family, num_tokens: int
) -> None:
    exact = write_checkpoint(tmp_path, family.overrides, dense=True)
    ids = torch.randint(0, 128, (num_tokens,), generator=torch.Generator().manual_seed(7)).tolist()
    model = variant.load(tmp_path, cache_type="fp32", max_input_len=7, max_seq_len=NUM_TOKENS)
    assert_as_accurate(whole(model, ids), *their_logits(tmp_path, exact, ids))
