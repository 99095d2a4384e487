"""config.json of every family: what it leaves out is as in transformers, and what does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from ropewalk.base.errors import ConfigError, UnsupportedError
from ropewalk.config.model import ModelConfig, parse_model_config
from ropewalk.families import FAMILIES
from ropewalk.families.program import Activation
from ropewalk.rope.rope import Rope, resolve_rope

LLAMAS = {"llama", "mistral", "qwen2", "qwen3"}  # tests/config/test_model.py
OTHERS = sorted(name for name, family in FAMILIES.items() if name not in LLAMAS)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 300000,
}
EPS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")


def raw(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, "architectures": [FAMILIES[family].architectures[0]], **SIZES, **changes}


def parse(family: str, **changes: Any) -> ModelConfig:
    return parse_model_config(raw(family, **changes), "config.json")


def rope(family: str, **changes: Any) -> Rope:
    return resolve_rope(raw(family, **changes))


@pytest.mark.parametrize("family", OTHERS)
def test_what_a_file_leaves_out_is_as_in_transformers(family: str) -> None:
    # Heads must divide each other; families whose default would not are given a number.
    changes = {} if (FAMILIES[family].num_kv_heads or 4) <= 4 else {"num_key_value_heads": 2}
    theirs = transformers.AutoConfig.for_model(family, **SIZES, **changes)
    ours = parse(family, **changes)
    eos = theirs.eos_token_id
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", 4)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.norm_eps == next(getattr(theirs, key) for key in EPS if hasattr(theirs, key))
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    types = getattr(theirs, "layer_types", None)
    if types is not None:
        window = theirs.sliding_window
        assert ours.sliding_windows == tuple(window if name == "sliding_attention" else None for name in types)
    parameters = theirs.rope_parameters
    full = parameters.get("full_attention", parameters)
    decided = resolve_rope(raw(family, **changes))
    assert decided.theta == full["rope_theta"]
    assert decided.rotary_dim == int(ours.head_dim * full.get("partial_rotary_factor", 1.0))
    if "sliding_attention" in parameters:
        assert decided.sliding_theta == parameters["sliding_attention"]["rope_theta"]


def test_layer_types_come_before_any_pattern() -> None:
    types = ["full_attention", "sliding_attention"] * 4
    ours = parse("gemma3_text", layer_types=types, sliding_window_pattern=3, sliding_window=9)
    assert ours.sliding_windows == (None, 9) * 4 and ours.rotations == (0, 1) * 4
    ours = parse("gemma3_text", sliding_window_pattern=3, sliding_window=9)
    assert ours.sliding_windows == (9, 9, None, 9, 9, None, 9, 9)
    ours = parse("cohere2", sliding_window=9)
    assert ours.rotations == (0, 0, 0, None) * 2


def test_the_spelling_of_transformers_4_means_the_same_as_that_of_5() -> None:
    old = rope("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=5000)
    both = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000},
    }
    new = rope("gemma3_text", rope_parameters=both)
    assert old.turns_like(new) and old.sliding_theta == 5000 and old.method.name == "linear"
    old = rope("gpt_neox", rotary_pct=0.5, rotary_emb_base=5000)
    assert old.turns_like(rope("gpt_neox", rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 5000}))
    assert rope("phi3", rope_scaling=longrope("yarn")).turns_like(rope("phi3", rope_scaling=longrope("longrope")))


def longrope(name: str) -> dict[str, Any]:
    return {"type": name, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    "family, changes, activation",
    [
        ("gemma", {}, Activation.GELU_TANH),
        ("gemma", {"hidden_act": "gelu"}, Activation.GELU_TANH),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, Activation.GELU_TANH),
        ("gemma2", {"hidden_activation": "gelu"}, Activation.GELU),
        ("gemma2", {"hidden_act": "silu"}, Activation.GELU_TANH),  # not the key that counts
        ("gpt_neox", {}, Activation.GELU),
        ("gpt_neox", {"hidden_act": "gelu_new"}, Activation.GELU_TANH),
        ("starcoder2", {}, Activation.GELU_TANH),
        ("phi3", {}, Activation.SILU),
        ("llama", {"hidden_act": "gelu"}, Activation.GELU),
    ],
)
def test_activations_by_their_names(family: str, changes: dict[str, Any], activation: Activation) -> None:
    assert parse(family, num_key_value_heads=2, **changes).activation is activation


def test_factors_and_caps() -> None:
    scales = parse("gemma2").scales
    assert (scales.attention, scales.embeddings) == (256**-0.5, 8.0)
    assert (scales.attention_cap, scales.logits_cap) == (50.0, 30.0)
    scales = parse("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None).scales
    assert (scales.attention_cap, scales.logits_cap) == (None, None)
    scales = parse("granite", embedding_multiplier=12, logits_scaling=8, attention_multiplier=0.25).scales
    assert (scales.embeddings, scales.logits, scales.attention, scales.residual) == (12.0, 0.125, 0.25, 1.0)


@pytest.mark.parametrize(
    "family, changes, error, message",
    [
        ("gemma2", {"hidden_activation": "relu2"}, UnsupportedError, "hidden_activation 'relu2' is not supported"),
        ("gemma2", {"layer_types": ["full_attention"] * 7}, ConfigError, "layer_types must be a list of 8 times"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 8}, ConfigError, "layer_types must be a list of 8"),
        ("gemma3_text", {"sliding_window": None}, ConfigError, "sliding_window must be an integer from 1"),
        ("gemma3_text", {"sliding_window_pattern": 0}, ConfigError, "sliding_window_pattern must be an integer from 1"),
        ("gemma2", {"query_pre_attn_scalar": 0}, ConfigError, "query_pre_attn_scalar must be a number from 1e-06"),
        ("granite", {"logits_scaling": 0.0}, ConfigError, "logits_scaling must be a number from 1e-06"),
        ("cohere", {"logit_scale": "x"}, ConfigError, "logit_scale must be a number"),
        ("cohere", {"use_qk_norm": 1}, ConfigError, "use_qk_norm must be true or false"),
        ("glm4", {"partial_rotary_factor": 0.01}, ConfigError, "partial_rotary_factor must be a part of head_dim"),
        ("stablelm", {"use_parallel_residual": "no"}, ConfigError, "use_parallel_residual must be true or false"),
        ("starcoder2", {"norm_epsilon": 0}, ConfigError, "norm_epsilon must be a number above 0"),
        ("phi3", {"layer_types": ["sliding_attention"] * 8}, UnsupportedError, "layer_types that differ"),
    ],
)
def test_what_does_not_fit_is_named(family: str, changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"^config.json: {message}"):
        parse(family, num_key_value_heads=2, **changes)


def test_an_argument_cannot_rotate_another_part_of_heads_that_are_ordered_for_their_own() -> None:
    part = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}
    with pytest.raises(UnsupportedError, match=r"in order for a rotation of 64 features of a head.*asks for 32"):
        resolve_rope(raw("glm4"), rope_scaling=part)
    assert resolve_rope(raw("phi3", num_key_value_heads=2), rope_scaling={**part, "partial_rotary_factor": 0.5})
