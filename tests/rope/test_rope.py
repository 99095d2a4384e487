"""The room rope/: tables against float64 references and transformers, spellings, overrides, errors."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fixtures import LOCAL_DATA, SHARED_FIXTURES, gptq_fixture_folders
from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.rope.methods import (
    DynamicNtkScaling,
    LinearNtkScaling,
    LinearScaling,
    NoScaling,
    NtkByPartsScaling,
    NtkScaling,
    YarnScaling,
)
from ropewalk.rope.rope import Rope, remedy, resolve_rope

FOLDER = next((root / "rope" for root in (SHARED_FIXTURES, LOCAL_DATA) if (root / "rope").is_dir()), None)
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())["cases"] if FOLDER else []
TABLES = [case for case in MANIFEST if case["grade"] != "peer-deviation"]
SPELLINGS = json.loads((FOLDER / "spellings.json").read_text()) if FOLDER else {"cases": [], "base_config": {}}

BASE: dict[str, Any] = {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 2048}


def resolve(rope_scaling: Any = None, **config: Any) -> Rope:
    """The Rope of a small config.json with this scaling object and these changes."""
    return resolve_rope({**BASE, "rope_scaling": rope_scaling, **config})


def plain(theta: float, rotary_dim: int) -> np.ndarray:
    """[R/2] float64, written independently of the package."""
    return np.array([theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])


def arguments_of(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, overrides) that ask for a table of the manifest; those without a config are asked for by arguments."""
    if "config" in case:
        return case["config"], {}
    config: dict[str, Any] = {"head_dim": 128, "max_position_embeddings": 2048, "rope_theta": float(case["base"])}
    if "exllama" in case:
        return config, case["exllama"]
    if case["method"] == "linear":
        return config, {"compress_pos_emb": int(case["id"][len("linear")])}
    if "finetuned" in case["id"]:
        config["max_position_embeddings"] = 16384
        original = {"original_max_position_embeddings": 2048, "finetuned": True}
        return config, {"rope_scaling": {"rope_type": case["method"], **original}}
    return config, {"rope_scaling": {"rope_type": case["method"]}}


@pytest.mark.skipif(not TABLES, reason="no rope fixtures on this machine")
@pytest.mark.parametrize("case", TABLES, ids=lambda case: case["id"])
def test_a_method_matches_its_reference_table(case: dict[str, Any]) -> None:
    assert FOLDER is not None
    table = np.load(FOLDER / case["file"])
    config, overrides = arguments_of(case)
    rope = resolve_rope(config, **overrides)
    inv, scale = rope.inverse_frequencies(case.get("seq_len") or 16384)
    assert inv.dtype == np.float64
    assert rope.rotary_dim == case["rotary_dim"]
    assert scale == pytest.approx(float(table["attention_scaling"]), rel=1e-12)
    angles = table["positions"][:, None] * inv
    np.testing.assert_allclose(np.cos(angles) * scale, table["cos_f64"], atol=1e-10)
    np.testing.assert_allclose(np.sin(angles) * scale, table["sin_f64"], atol=1e-10)
    divides_positions = {"linear+ntk", "dynamic-linear"} | ({"linear"} if case["grade"] == "cross-check" else set())
    if case["method"] not in divides_positions:  # these keep inv_freq and scale positions: only their cos and sin tell
        np.testing.assert_allclose(inv, table["inv_freq_f64"], rtol=1e-12)


def reference_of_transformers(config: dict[str, Any], seq_len: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies, attention scale) that transformers computes in float32 for a llama with this config."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    known = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
    theirs = transformers.LlamaConfig(**{**known, **json.loads(json.dumps(config))})
    rope_type = theirs.rope_parameters["rope_type"]
    if rope_type == "default":
        inv, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        inv, scale = ROPE_INIT_FUNCTIONS[rope_type](theirs, "cpu", seq_len=seq_len)
    return inv.double().numpy(), float(scale)


def assert_as_transformers(config: dict[str, Any], seq_len: int) -> None:
    expected, expected_scale = reference_of_transformers(config, seq_len)
    inv, scale = resolve_rope(config).inverse_frequencies(seq_len)
    np.testing.assert_allclose(inv, expected, rtol=2e-5, atol=1e-12)
    assert scale == pytest.approx(expected_scale, rel=1e-6)


# What we do where the recommendation is not "as transformers 5.23.0": an equivalent plain config, or the error.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
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


LENGTHS = st.sampled_from([512, 2048, 4096, 8192, 32768])
FACTORS = st.floats(1.0, 64.0)
THETAS = st.sampled_from([1000.0, 10000.0, 500000.0, 1e6, 1e7])
HEAD_DIMS = st.sampled_from([8, 32, 64, 96, 128, 256])


def options(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


SCALINGS = st.one_of(
    st.builds(lambda f: {"rope_type": "linear", "factor": f}, FACTORS),
    st.builds(lambda f: {"type": "dynamic", "factor": f}, FACTORS),
    st.builds(
        lambda f, o, more: {"rope_type": "yarn", "factor": f, "original_max_position_embeddings": o, **more},
        FACTORS,
        LENGTHS,
        options(
            beta_fast=st.floats(8, 64),
            beta_slow=st.floats(0.25, 8),
            truncate=st.booleans(),
            attention_factor=st.floats(0.1, 3),
            mscale=st.floats(0, 2),
            mscale_all_dim=st.floats(0, 2),
        ),
    ),
    st.builds(
        lambda f, o, low, high: {
            "rope_type": "llama3",
            "factor": f,
            "original_max_position_embeddings": o,
            "low_freq_factor": low,
            "high_freq_factor": low + high,
        },
        FACTORS,
        LENGTHS,
        st.floats(0.5, 4),
        st.floats(0.5, 8),
    ),
    st.builds(
        lambda f, p: {"rope_type": "proportional", "factor": f, "partial_rotary_factor": p}, FACTORS, st.floats(0.25, 1)
    ),
)


@settings(max_examples=200, deadline=None)
@given(SCALINGS, HEAD_DIMS, THETAS, LENGTHS, st.integers(1, 200_000))
def test_random_parameters_give_what_transformers_gives(
    scaling: dict[str, Any], head_dim: int, theta: float, max_positions: int, seq_len: int
) -> None:
    config = {"head_dim": head_dim, "max_position_embeddings": max_positions, "rope_theta": theta}
    assert_as_transformers({**config, "rope_scaling": scaling}, seq_len)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([8, 64]), LENGTHS, st.integers(1, 200_000))
def test_random_longrope_lists_give_what_transformers_gives(
    data: st.DataObject, head_dim: int, original: int, seq_len: int
) -> None:
    factors = st.lists(st.floats(0.5, 80), min_size=head_dim // 2, max_size=head_dim // 2)
    scaling = {"rope_type": "longrope", "short_factor": data.draw(factors), "long_factor": data.draw(factors)}
    scaling.update(data.draw(options(factor=FACTORS, attention_factor=st.floats(0.1, 3))))
    config = {"head_dim": head_dim, "max_position_embeddings": 4 * original, "rope_scaling": scaling}
    assert_as_transformers({**config, "original_max_position_embeddings": original}, seq_len)


def test_ntk_by_parts_has_the_ratios_of_its_authors_constants() -> None:
    rope = resolve_rope({"head_dim": 128, "max_position_embeddings": 16384, "original_max_position_embeddings": 4096})
    ratios = rope.inverse_frequencies(16384)[0] / plain(10000, 128)
    expected = {0: 1, 25: 1, 26: 0.972770, 28: 0.913756, 32: 0.778856, 36: 0.623843, 40: 0.451286, 41: 0.405680}
    expected |= {43: 0.388213, 44: 0.353811, 46: 0.295365, 48: 0.25, 63: 0.25}
    for pair, ratio in expected.items():
        assert ratios[pair] == pytest.approx(ratio, abs=1e-6)
    assert rope.decided_by == "original_max_position_embeddings of config.json"
    assert rope.covers == 16384


def test_the_airophin_rule_can_be_asked_for_and_turned_off_by_argument() -> None:
    config = {**BASE, "max_position_embeddings": 10000, "original_max_position_embeddings": 4096}
    assert resolve_rope(config).method == NtkByPartsScaling(2.0, 4096)
    assert resolve_rope(config, rope_scaling={"rope_type": "default"}).method == NoScaling()
    assert resolve_rope(config, rope_scaling={}).method == NoScaling()
    asked = resolve_rope(BASE, rope_scaling={"rope_type": "ntk-by-parts", "factor": 2.5})
    assert (asked.method, asked.covers) == (NtkByPartsScaling(2.5, 2048), 5120)
    assert asked.decided_by == "argument rope_scaling"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": "qwen2"},
        {"architectures": ["MistralForCausalLM"], "model_type": None},
        {"original_max_position_embeddings": 16384},
        {"original_max_position_embeddings": 32768},
    ],
)
def test_the_airophin_rule_needs_an_extended_llama(changes: dict[str, Any]) -> None:
    config = {**BASE, "max_position_embeddings": 16384, "original_max_position_embeddings": 4096, **changes}
    assert resolve_rope(config).method == NoScaling()


def test_a_declared_scaling_goes_before_the_airophin_rule() -> None:
    scaling = {"type": "linear", "factor": 4}
    assert resolve(scaling, original_max_position_embeddings=512).method == LinearScaling(4.0)


SUPERHOT = {"AutoModelForCausalLM": "modelling_llama.LlamaForCausalLM", "AutoModel": "modelling_llama.LlamaModel"}


def test_a_superhot_folder_is_recognised() -> None:
    rope = resolve_rope({**BASE, "max_position_embeddings": 8192, "auto_map": SUPERHOT})
    assert (rope.method, rope.original_length, rope.covers) == (LinearScaling(4.0), 2048, 8192)
    assert rope.decided_by == "auto_map to modelling_llama and max_position_embeddings of config.json"
    by_argument = resolve_rope({**BASE, "max_position_embeddings": 8192, "auto_map": SUPERHOT}, compress_pos_emb=4)
    assert (by_argument.method, by_argument.covers) == (LinearScaling(4.0), 8192)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 2048},
        {"auto_map": {"AutoModel": "modeling_llama.LlamaModel"}},
        {"auto_map": None},
        {"auto_map": "modelling_llama.LlamaModel"},
        {"auto_map": {"AutoModel": 4}},
        {"model_type": "mistral"},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
    ],
)
def test_other_folders_are_not_taken_for_superhot(changes: dict[str, Any]) -> None:
    rope = resolve_rope({**BASE, "max_position_embeddings": 8192, "auto_map": SUPERHOT, **changes})
    np.testing.assert_array_equal(rope.inverse_frequencies(9000)[0], plain_of(rope))


def plain_of(rope: Rope) -> np.ndarray:
    return NoScaling().frequencies(rope.theta, rope.rotary_dim, 1)[0]


def test_the_knobs_replace_the_scaling_of_the_config() -> None:
    config = {**BASE, "rope_scaling": YARN, "rope_theta": 5e5}
    both = resolve_rope(config, compress_pos_emb=2, alpha_value=4.0)
    assert both.method == LinearNtkScaling(2.0, 4.0)
    assert both.decided_by == "arguments compress_pos_emb and alpha_value"
    assert both.covers == 4096 * 8
    np.testing.assert_allclose(both.inverse_frequencies(1)[0], plain(5e5 * 4 ** (64 / 62), 64) / 2, rtol=1e-12)
    assert resolve_rope(config, compress_pos_emb=2).method == LinearScaling(2.0)
    assert resolve_rope(config, alpha_value=2.5).method == NtkScaling(2.5)
    assert resolve_rope(config, compress_pos_emb=1).method == NoScaling()


def test_an_argument_scaling_keeps_theta_and_original_length_of_the_config() -> None:
    scaling = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 1024, "rope_theta": 5e5}
    rope = resolve_rope({**BASE, "rope_parameters": scaling}, rope_scaling={"type": "yarn", "factor": 16})
    assert (rope.method, rope.theta, rope.covers) == (YarnScaling(16.0, 1024), 5e5, 16384)
    own = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 512, "rope_theta": 7e5}
    rope = resolve_rope({**BASE, "original_max_position_embeddings": 256, "rope_scaling": scaling}, rope_scaling=own)
    assert (rope.method, rope.theta, rope.covers) == (YarnScaling(2.0, 512), 7e5, 1024)


def test_an_argument_scaling_is_read_even_where_the_config_has_one_that_is_not_supported() -> None:
    rope = resolve_rope(
        {**BASE, "rope_scaling": {"type": "deepseek_yarn"}}, rope_scaling={"type": "dynamic", "factor": 2}
    )
    assert rope.method == DynamicNtkScaling(2.0, 2048)


def test_theta_as_an_argument_combines_with_everything() -> None:
    assert resolve_rope({**BASE, "rope_theta": 5e5}, rope_theta=1e6).theta == 1e6
    rope = resolve_rope({**BASE, "rope_parameters": {"rope_theta": 5e5}}, rope_theta=2e4, alpha_value=2)
    np.testing.assert_allclose(rope.inverse_frequencies(1)[0], plain(2e4 * 2 ** (64 / 62), 64), rtol=1e-12)
    assert rope.decided_by == "argument alpha_value, theta by argument rope_theta"


def test_a_part_of_the_head_is_rotated_when_it_is_said_clearly() -> None:
    rope = resolve_rope(BASE, rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.5})
    assert rope.rotary_dim == 32
    np.testing.assert_allclose(rope.inverse_frequencies(1)[0], plain(10000, 32), rtol=1e-12)
    whole = resolve_rope(
        {**BASE, "partial_rotary_factor": 0.5}, rope_scaling={"rope_type": "default", "partial_rotary_factor": 1.0}
    )
    assert whole.rotary_dim == 64


def test_the_head_size_is_derived_where_it_is_not_given() -> None:
    assert resolve_rope({"hidden_size": 4096, "num_attention_heads": 32}).head_dim == 128
    assert resolve_rope({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16}).head_dim == 128
    assert resolve_rope({"model_type": "mistral", "head_dim": 8}).covers == 131072


def test_dynamic_scaling_depends_on_the_length_and_static_scaling_does_not() -> None:
    dynamic = resolve({"type": "dynamic", "factor": 2.0})
    assert dynamic.depends_on_length
    np.testing.assert_array_equal(dynamic.inverse_frequencies(100)[0], dynamic.inverse_frequencies(2048)[0])
    assert np.all(dynamic.inverse_frequencies(2049)[0][1:] < dynamic.inverse_frequencies(2048)[0][1:])
    linear = resolve({"type": "linear", "factor": 2.0})
    assert not linear.depends_on_length
    np.testing.assert_array_equal(linear.inverse_frequencies(100)[0], linear.inverse_frequencies(9999)[0])


def test_dynamic_scaling_starts_at_a_declared_original_length(caplog: pytest.LogCaptureFixture) -> None:
    rope = resolve({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512})
    assert rope.method == DynamicNtkScaling(2.0, 512)
    assert "transformers starts at max_position_embeddings, 2048" in caplog.text


@pytest.mark.parametrize(
    ("scaling", "config", "covers"),
    [
        (None, {}, 2048),
        ({"type": "linear", "factor": 2.5}, {}, 5120),
        ({"type": "linear", "factor": 4}, {"original_max_position_embeddings": 512}, 2048),
        ({"type": "ntk", "factor": 1.15}, {"max_position_embeddings": 2000}, 2300),
        ({"type": "dynamic", "factor": 2}, {}, None),
        ({"type": "dynamic-yarn"}, {}, None),
        ({"type": "yarn", "factor": 4}, {}, 8192),
        (YARN, {"max_position_embeddings": 4096}, 16384),
        ({**YARN, "factor": 8}, {"max_position_embeddings": 16384}, 32768),
        ({"type": "dynamic", "alpha": 1000.0}, {}, 2048),
    ],
)
def test_a_rope_knows_how_many_positions_it_covers(scaling: Any, config: dict[str, Any], covers: int | None) -> None:
    assert resolve(scaling, **config).covers == covers


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "overrides"),
    [
        (None, {}),
        ({"type": "linear", "factor": 2.0}, {}),
        ({"type": "ntk", "factor": 2.0}, {}),
        ({"type": "dynamic", "alpha": 1000.0}, {}),
        ({"type": "ntk-by-parts", "factor": 2.0}, {}),
        (YARN, {}),
        (LLAMA3, {}),
        (None, {"compress_pos_emb": 2, "alpha_value": 2}),
        (None, {"rope_scaling": {"type": "yarn", "factor": 1.5}}),
    ],
)
@pytest.mark.parametrize("seq_len", [100_001, 65_536])
def test_the_remedy_of_the_warning_covers_what_was_asked(
    scaling: Any, overrides: dict[str, Any], seq_len: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**BASE, "rope_scaling": scaling}
    rope = resolve_rope(config, seq_len, **overrides)
    assert f"a context of {seq_len} is beyond the {rope.covers} positions" in caplog.text
    advice = remedy(rope, seq_len)
    assert advice in caplog.text
    caplog.clear()
    cured = eval(f"resolve_rope(config, seq_len, {advice.replace(' with ', ', ')})")
    assert cured.covers >= seq_len
    assert not caplog.records


def test_no_warning_within_what_is_covered(caplog: pytest.LogCaptureFixture) -> None:
    resolve_rope(BASE, 2048)
    resolve_rope({**BASE, "rope_scaling": {"type": "dynamic", "factor": 2}}, 10**6)
    assert not caplog.records


def test_rotation_tables_are_float32_of_float64_angles() -> None:
    rope = resolve(YARN)
    cos, sin = rope.rotation_tables(131_000, 131_072, 131_072)
    inv, scale = rope.inverse_frequencies(131_072)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (72, 32)
    angle = 131_071 * inv[5]
    assert cos[-1, 5] == np.float32(math.cos(angle) * scale)
    assert sin[-1, 5] == np.float32(math.sin(angle) * scale)
    assert rope.rotation_tables(5, 5, 5)[0].shape == (0, 32)


def test_tables_of_a_chunk_are_those_of_the_whole() -> None:
    rope = resolve({"type": "dynamic", "factor": 2.0})
    whole = rope.rotation_tables(0, 100, 5000)[0]
    np.testing.assert_array_equal(rope.rotation_tables(37, 61, 5000)[0], whole[37:61])


def test_the_description_says_method_values_and_source() -> None:
    text = resolve({"type": "linear", "factor": 4.0}).describe()
    assert text == (
        "RoPE scaling: linear, factor 4, original length 2048, covers 8192 positions, theta 10000; "
        "decided by rope_scaling.type of config.json"
    )
    text = resolve({"rope_type": "dynamic", "factor": 2, "partial_rotary_factor": 0.5}).describe()
    assert "dynamic, factor 2" in text
    assert "adapts to the length" in text
    assert "32 of 64 features" in text
    assert resolve_rope(BASE, source="m/config.json").describe().endswith("decided by no scaling key in m/config.json")


WRONG_NUMBERS = [0, -1.0, 1e-320, float("nan"), float("inf"), float("-inf"), True, "4", [4], {}, 1e300, 10**400]


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", ["compress_pos_emb", "alpha_value", "rope_theta"])
def test_an_absurd_argument_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"arguments: {name} must be a number (from|above)"):
        resolve_rope(BASE, **{name: value})


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


def test_rope_scaling_and_a_knob_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not go together with compress_pos_emb"):
        resolve_rope(BASE, rope_scaling={"type": "linear", "factor": 2}, compress_pos_emb=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "must hold a JSON object"),
        ({}, "hidden_size must be an integer"),
        ({"hidden_size": 64}, "num_attention_heads must be an integer"),
        ({"head_dim": 63}, "head size .* must be even"),
        ({"hidden_size": 1, "num_attention_heads": 4}, "head size"),
        ({**BASE, "max_position_embeddings": "2048"}, "max_position_embeddings must be an integer"),
        ({**BASE, "model_type": 4}, "model_type must be a string"),
        ({**BASE, "rope_theta": 1.0}, "rope_theta must be a number above 1"),
        ({**BASE, "original_max_position_embeddings": 1}, "original_max_position_embeddings must be an integer from 2"),
        ({**BASE, "rope_parameters": 3}, "rope_parameters must be an object"),
    ],
)
def test_a_damaged_config_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="config.json.*" + message):
        resolve_rope(config)


@pytest.mark.parametrize("length", [0, -1, 1.5, "4", None, True, 10**30])
def test_an_absurd_length_is_refused(length: Any) -> None:
    with pytest.raises(ConfigError, match="seq_len must be an integer from 1"):
        resolve_rope(BASE).inverse_frequencies(length)
    with pytest.raises(ConfigError, match="start must be an integer|end must be"):
        resolve_rope(BASE).rotation_tables(0, -1, 5)
    with pytest.raises(ConfigError, match="end must be at least start, 7, found 3"):
        resolve_rope(BASE).rotation_tables(7, 3, 5)


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


def test_warnings_come_from_the_packages_loggers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_rope({**BASE, "alpha_value": 2}, 9999)
    assert {record.name.split(".")[0] for record in caplog.records} == {"ropewalk"}
    assert Path(caplog.records[0].pathname).name == "decision.py"


@pytest.mark.skipif(not gptq_fixture_folders(), reason="no GPTQ fixtures on this machine")
def test_the_frequencies_of_real_checkpoints_are_those_they_were_evaluated_with(gptq_fixture: Path) -> None:
    expected = np.load(gptq_fixture / "expected.npz")
    rope = resolve_rope(json.loads((gptq_fixture / "config.json").read_text()))
    inv, scale = rope.inverse_frequencies(len(expected["input_ids"]))
    np.testing.assert_allclose(inv, expected["rope_inv_freq"], rtol=1e-6)
    assert scale == pytest.approx(float(expected["rope_attention_scaling"]), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ({"max_position_embeddings": 4096}, {}, 4096),
        # a declared length may already be the extended one: a factor does not multiply it
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}}, {}, 32768),
        ({"max_position_embeddings": 16384, "original_max_position_embeddings": 4096}, {}, 16384),
        ({"max_position_embeddings": 4096}, {"compress_pos_emb": 4}, 16384),
        ({"max_position_embeddings": 4096}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
    ],
)
def test_the_default_length_is_the_declared_one_unless_an_argument_reaches_further(config, arguments, expected):
    base = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4}
    assert resolve_rope({**base, **config}, **arguments).default_length == expected
