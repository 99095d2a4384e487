"""A resolved Rope: its tables, how far it reaches, and how it describes itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import gptq_fixture_folders
from rope_cases import (
    BASE,
    YARN,
    resolve,
)
from ropewalk.base.errors import ConfigError
from ropewalk.rope.rope import resolve_rope


def test_dynamic_scaling_depends_on_the_length_and_static_scaling_does_not() -> None:
    dynamic = resolve({"type": "dynamic", "factor": 2.0})
    assert dynamic.depends_on_length
    np.testing.assert_array_equal(dynamic.inverse_frequencies(100)[0], dynamic.inverse_frequencies(2048)[0])
    assert np.all(dynamic.inverse_frequencies(2049)[0][1:] < dynamic.inverse_frequencies(2048)[0][1:])
    linear = resolve({"type": "linear", "factor": 2.0})
    assert not linear.depends_on_length
    np.testing.assert_array_equal(linear.inverse_frequencies(100)[0], linear.inverse_frequencies(9999)[0])


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


@pytest.mark.parametrize("length", [0, -1, 1.5, "4", None, True, 10**30])
def test_an_absurd_length_is_refused(length: Any) -> None:
    with pytest.raises(ConfigError, match="seq_len must be an integer from 1"):
        resolve_rope(BASE).inverse_frequencies(length)
    with pytest.raises(ConfigError, match="start must be an integer|end must be"):
        resolve_rope(BASE).rotation_tables(0, -1, 5)
    with pytest.raises(ConfigError, match="end must be at least start, 7, found 3"):
        resolve_rope(BASE).rotation_tables(7, 3, 5)


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
