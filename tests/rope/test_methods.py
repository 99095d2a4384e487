"""Frequencies of every method against float64 reference tables and against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_cases import (
    FOLDER,
    TABLES,
    assert_as_transformers,
    plain,
)
from ropewalk.rope.rope import resolve_rope


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
