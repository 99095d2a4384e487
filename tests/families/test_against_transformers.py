"""Small models of every family as transformers saves them: its logits, in a prompt, in decoding, after a prefix hit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ropewalk.families import FAMILIES
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from their_folder import logits_of, save_model
from variants import variants

NUM_TOKENS, EDIT_POS, PROMPT = 90, 41, 70
MOST_ERROR = 3e-5  # of the largest logit: both sides compute in float32

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(6)],
    "long_factor": [1.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 17, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}),
    "gemma2-no-caps": (
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 17},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 13,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 24}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    "cohere-plain": ("cohere", {"attention_bias": True, "rope_parameters": LINEAR}),
    "cohere2": ("cohere2", {"sliding_window": 19, "num_hidden_layers": 4, "attention_bias": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 30}),
    "starcoder2-no-bias": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "glm4": ("glm4", {"head_dim": 16, "pad_token_id": None}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm-parallel": (
        "stablelm",
        {"use_parallel_residual": True, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "num_experts": 6, "norm_topk_prob": True}),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        {
            **{**EXPERTS, "head_dim": 32, "num_experts": 5, "attention_bias": True, "num_hidden_layers": 4},
            **{"decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True, "sliding_window": 21},
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 72}),
    "qwen2_moe-mixed": (
        "qwen2_moe",
        {
            **{**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40, "qkv_bias": False},
            **{"norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3},
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 19}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}),
}
ELSEWHERE = {"llama", "mistral", "qwen2", "qwen3"}  # tests/families/test_families.py


def test_every_family_is_compared_with_transformers() -> None:
    assert {family for family, _ in CASES.values()} | ELSEWHERE == set(FAMILIES)


@dataclass(frozen=True)
class Case:
    """A folder, ids, others that begin alike, and what transformers says about both."""

    folder: Path
    ids: list[int]
    logits: torch.Tensor  # [T, V]
    edited_ids: list[int]
    edited_logits: torch.Tensor


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder, family, **settings)
    first, second = torch.randint(3, 128, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(7)).tolist()
    second[:EDIT_POS] = first[:EDIT_POS]
    return Case(folder, first, logits_of(model, first), second, logits_of(model, second))


def loaded(case: Case, backend: str, **options: Any) -> Model:
    return load_model(case.folder, backend=backend, compute="exact", cache_type="fp32", **options)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= MOST_ERROR * want.abs().max()


BACKENDS = sorted({variant.backend for variant in variants()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_transformers_in_prompt_decoding_and_after_a_prefix_hit(case: Case, backend: str) -> None:
    model = loaded(case, backend)
    cache = model.new_cache()
    parts = [model.forward(case.ids[:PROMPT], cache, logits="all", seq_len=NUM_TOKENS)]
    parts += [model.forward([token_id], cache, seq_len=NUM_TOKENS) for token_id in case.ids[PROMPT:]]
    assert_close(torch.cat(parts), case.logits)
    kept = model.reusable_prefix(cache, case.edited_ids)
    assert kept == EDIT_POS
    cache.truncate(kept)
    assert_close(model.forward(case.edited_ids[kept:], cache, logits="all"), case.edited_logits[kept:])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled core is not installed")
def test_chunks_batches_and_formats_of_the_cache_work_as_in_any_family(case: Case) -> None:
    for cache_type in ("fp16", "q8"):
        whole = load_model(case.folder, backend="cpu", threads=1, cache_type=cache_type)
        chunked = load_model(case.folder, backend="cpu", threads=2, cache_type=cache_type, max_input_len=7)
        want = whole.forward(case.ids, whole.new_cache(), logits="all", seq_len=NUM_TOKENS)
        got = chunked.forward(case.ids, chunked.new_cache(), logits="all", seq_len=NUM_TOKENS)
        assert torch.equal(got, want)
        spans = [Span(case.ids[:n], whole.new_cache(), "all", seq_len=NUM_TOKENS) for n in (NUM_TOKENS, 5, 1)]
        for span, logits in zip(spans, whole.step(spans), strict=True):
            assert torch.equal(logits, want[: len(span.token_ids)])
        assert (want - case.logits).abs().mean() < 0.05 * case.logits.abs().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_keys_are_where_a_fresh_call_would_put_them_in_the_first_layer(case: Case, backend: str) -> None:
    """With one layer nothing but rotations tells a shifted cache from a fresh one."""
    model = loaded(case, backend, layer_order="0")
    fresh, shifted = model.new_cache(), model.new_cache()
    ids = case.ids[:4] + case.ids[20:60]
    model.forward(ids, fresh, logits="none", seq_len=NUM_TOKENS)
    model.forward(case.ids[:60], shifted, logits="none", seq_len=NUM_TOKENS)
    assert model.shift(shifted, 4, 16) == 40
    got, want = (model.forward([5], cache, seq_len=NUM_TOKENS) for cache in (shifted, fresh))
    assert_close(got, want)
