"""Which scaling applies: the config's, an argument's or that of a recognised folder, and what is warned about."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rope_cases import (
    BASE,
    LLAMA3,
    WRONG_NUMBERS,
    YARN,
    plain,
    resolve,
)
from ropewalk.base.errors import ConfigError
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


def test_dynamic_scaling_starts_at_a_declared_original_length(caplog: pytest.LogCaptureFixture) -> None:
    rope = resolve({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512})
    assert rope.method == DynamicNtkScaling(2.0, 512)
    assert "transformers starts at max_position_embeddings, 2048" in caplog.text


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


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", ["compress_pos_emb", "alpha_value", "rope_theta"])
def test_an_absurd_argument_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"arguments: {name} must be a number (from|above)"):
        resolve_rope(BASE, **{name: value})


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


def test_warnings_come_from_the_packages_loggers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_rope({**BASE, "alpha_value": 2}, 9999)
    assert {record.name.split(".")[0] for record in caplog.records} == {"ropewalk"}
    assert Path(caplog.records[0].pathname).name == "decision.py"
