"""How config.json files spell a scaling: what is read, and what is refused with file and key."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rope_cases import (
    BASE,
    LLAMA3,
    SPELLINGS,
    WRONG_NUMBERS,
    YARN,
    assert_as_transformers,
    resolve,
)
from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.rope.methods import (
    NtkByPartsScaling,
)
from ropewalk.rope.rope import resolve_rope

DECISIONS: dict[str, Any] = {
    "conflict type=linear rope_type=dynamic": ConfigError,
    "factor missing, linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic with alpha (Hunyuan)": {"rope_theta": 10000 * 1000 ** (64 / 62)},
    "yarn type + finetuned (NousResearch Yarn-Llama-2)": {"rope_scaling": YARN},
    "yarn without factor": {"rope_scaling": YARN},
    "yarn factor null": {"rope_scaling": YARN},
    "yarn, original_max top-level only": {"rope_scaling": YARN},
    "yarn, top-level original 2048 vs nested 4096": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 2048}
    },
    "yarn mscale+mscale_all_dim equal (DeepSeek/Mistral)": {"rope_scaling": {**YARN, "attention_factor": 1.0}},
    "dynamic-yarn (remote code)": {"rope_scaling": YARN},  # the table for 16384 positions from 4096
    "deepseek_yarn": UnsupportedError,
    "ntk": {"rope_theta": 10000 * 4 ** (64 / 62)},
    "su, top-level original (Phi-3 style, in Llama)": "longrope, top-level original (Phi-3 style, in Llama)",
    "llama3, top-level original 4096 vs nested 8192": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "Airophin: top-level original only": NtkByPartsScaling(4.0, 4096),
    "v5 theta conflict: top-level 10000, nested 500000": {"rope_theta": 500000.0},
    "both: rope_scaling linear4 and rope_parameters yarn": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "v5 per-layer dict in Llama (no layer_types)": UnsupportedError,
    "partial_rotary_factor 0.5 top-level, default": UnsupportedError,
    "mrope (Qwen2-VL)": {},
    "type mrope + rope_type default": {},
    "compress_pos_emb / alpha_value in config.json": {},
}


WARNED = (
    "factor missing, linear",
    "dynamic with alpha (Hunyuan)",
    "yarn without factor",
    "yarn factor null",
    "yarn, top-level original 2048 vs nested 4096",
    "yarn attn_factor (remote-code name)",
    "llama3, top-level original 4096 vs nested 8192",
    "both: rope_scaling linear4 and rope_parameters yarn",
    "rotary_emb_base / rotary_pct (NeoX names)",
    "compress_pos_emb / alpha_value in config.json",
)


def full_config(config: dict[str, Any]) -> dict[str, Any]:
    base = {key: value for key, value in SPELLINGS["base_config"].items() if key != "note"}
    return {**base, **config}


@pytest.mark.skipif(not SPELLINGS["cases"], reason="no rope fixtures on this machine")
@pytest.mark.parametrize("case", SPELLINGS["cases"], ids=lambda case: case["spelling"])
def test_a_spelling_is_read_as_recommended(case: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config, name = full_config(case["config"]), case["spelling"]
    decision = DECISIONS.get(name)
    if decision is None:
        assert case["recommended"].startswith("as transformers 5.23.0"), "a spelling without a decision"
        assert_as_transformers(config, 16384)
    elif isinstance(decision, type):
        with pytest.raises(decision, match="config.json: "):
            resolve_rope(config)
        return
    elif isinstance(decision, NtkByPartsScaling):
        assert resolve_rope(config).method == decision
    else:
        if isinstance(decision, str):
            decision = next(other["config"] for other in SPELLINGS["cases"] if other["spelling"] == decision)
        inv, scale = resolve_rope(config).inverse_frequencies(16384)
        expected, expected_scale = resolve_rope(full_config(decision)).inverse_frequencies(16384)
        np.testing.assert_allclose(inv, expected, rtol=1e-12)
        assert scale == expected_scale
    caplog.clear()
    resolve_rope(config)
    assert bool(caplog.records) == (name in WARNED)


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"type": "linear"}, "factor"),
        ({"type": "ntk"}, "factor"),
        ({"type": "ntk-by-parts"}, "factor"),
        ({"type": "dynamic"}, "factor"),
        ({"type": "dynamic", "factor": 2}, "alpha"),
        ({"type": "yarn"}, "factor"),
        (YARN, "attention_factor"),
        (YARN, "original_max_position_embeddings"),
        (YARN, "rope_theta"),
        (YARN, "partial_rotary_factor"),
        *[(LLAMA3, key) for key in ("factor", "low_freq_factor", "high_freq_factor")],
        ({"type": "proportional"}, "partial_rotary_factor"),
    ],
)
def test_an_absurd_number_in_a_scaling_is_refused_by_key(scaling: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, dict):
        with pytest.raises(RopewalkError, match=rf"config.json: rope_scaling.{key} (is an object|must be an integer)"):
            resolve({**scaling, key: value})
        return
    with pytest.raises(ConfigError, match=rf"config.json: rope_scaling.{key} must be"):
        resolve({**scaling, key: value})
    with pytest.raises(ConfigError, match=rf"arguments: rope_scaling.{key} must be"):
        resolve_rope(BASE, rope_scaling={**scaling, key: value})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear"}, "rope_scaling.factor must be a number from 0.01 .* found nothing"),
        ({"type": "yarn"}, "rope_scaling.factor must be"),
        ({"factor": 4.0}, "rope_scaling.rope_type is missing beside factor; accepted are default, linear"),
        ({"type": 4}, "rope_scaling.type must be a string"),
        ({"type": "longrope", "long_factor": [1.0] * 32}, "short_factor must be a list of 32 numbers .* found None"),
        ({"type": "longrope", "short_factor": [1.0] * 31, "long_factor": []}, "short_factor .* found a list of 31"),
        (
            {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 31 + [0]},
            r"rope_scaling.long_factor\[31\] must be a number from 0.01 .* found 0",
        ),
        ({**LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor must be a number above low_freq_factor, 4"),
        ({**YARN, "beta_fast": 0.5}, "beta_fast must be at least beta_slow, 1"),
        ({**YARN, "truncate": 1}, "truncate must be true or false"),
        ({**YARN, "mscale": -1}, "mscale must be"),
        ({**YARN, "partial_rotary_factor": 0.3}, "partial_rotary_factor must be a part of head_dim, 64"),
        ({"type": "dynamic", "factor": 2, "partial_rotary_factor": 0.04}, "at least 4 rotated features, found 2"),
        ("linear", "rope_scaling must be an object, found 'linear'"),
        ([], "rope_scaling must be an object"),
    ],
)
def test_a_damaged_scaling_is_refused_with_file_and_key(scaling: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="config.json: .*" + message):
        resolve(scaling)


@pytest.mark.parametrize("name", ["deepseek_yarn", "axial", "linear ", "LINEAR", "xpos", "dynamic_ntk"])
def test_an_unknown_type_is_refused_with_the_accepted_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"rope_scaling.type '{name}' is not supported; accepted are .*yarn"):
        resolve({"type": name, "factor": 2})


@pytest.mark.parametrize("key", ["short_mscale", "long_mscale", "llama_4_scaling_beta"])
def test_an_option_that_we_do_not_implement_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"rope_scaling.{key} is not supported"):
        resolve({**YARN, key: 1.1})


def test_a_key_that_nothing_reads_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    resolve({"type": "linear", "factor": 2, "extrapolation_factor": 1.0})
    assert "rope_scaling.extrapolation_factor: not a key of rope type linear, ignored" in caplog.text


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["linear", "yarn", "longrope", "llama3", "dynamic", "su", "mrope", 1e308, 5e-324, 10**5000]),
    st.lists(st.floats(0.5, 4), min_size=4, max_size=4),
)


SCALING_KEYS = [
    *["type", "rope_type", "factor", "alpha", "original_max_position_embeddings", "attention_factor", "mscale"],
    *["mscale_all_dim", "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor", "rope_theta"],
    *["short_factor", "long_factor", "partial_rotary_factor", "finetuned"],
]


TOP_KEYS = [
    *["head_dim", "max_position_embeddings", "original_max_position_embeddings", "rope_theta", "auto_map"],
    *["partial_rotary_factor", "rope_scaling", "rope_parameters", "model_type", "architectures"],
]


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(
        ["linear", "ntk", "ntk-by-parts", "dynamic", "yarn", "dynamic-yarn", "llama3", "longrope", "proportional"]
    ),
    st.dictionaries(st.sampled_from(SCALING_KEYS), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(TOP_KEYS), VALUES, max_size=2),
    st.integers(1, 2**31),
)
def test_any_mangled_scaling_gives_finite_tables_or_a_named_error(
    name: str, scaling: dict[str, Any], top: dict[str, Any], seq_len: int
) -> None:
    base = {"rope_type": name, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {**BASE, "head_dim": 8, "rope_scaling": {**base, **lists, **scaling}, **top}
    try:
        rope = resolve_rope(config, seq_len)
    except RopewalkError as error:
        assert str(error).startswith("config.json")
        return
    assume(rope.head_dim <= 1024)
    inv, scale = rope.inverse_frequencies(seq_len)
    assert inv.shape == (rope.rotary_dim // 2,)
    assert np.all(np.isfinite(inv))
    assert np.all(inv >= 0)
    assert math.isfinite(scale)
    assert scale > 0
    assert "decided by" in rope.describe()
