"""rope_scaling="auto": the rule, case by case."""

from __future__ import annotations

import pytest

from ropewalk.base.errors import ConfigError
from ropewalk.rope.automatic import covered_without
from ropewalk.rope.given import rope_as_given

BASE = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
ORIGINAL = "original_max_position_embeddings"


def with_scaling(max_positions: int, **scaling: object) -> dict:
    return {**BASE, "max_position_embeddings": max_positions, "rope_scaling": scaling}


YARN = with_scaling(8192, rope_type="yarn", factor=4.0, **{ORIGINAL: 2048})
LLAMA3 = with_scaling(
    8192, rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **{ORIGINAL: 2048}
)
DYNAMIC = with_scaling(2048, rope_type="dynamic", factor=2.0)
LINEAR = with_scaling(8192, rope_type="linear", factor=4.0, **{ORIGINAL: 2048})
PARTS = {**BASE, "max_position_embeddings": 8192, ORIGINAL: 2048}


@pytest.mark.parametrize(
    "config, seq_len, method, values",
    [
        (BASE, None, "none", {}),
        (BASE, 2048, "none", {}),
        (BASE, 3000, "ntk-by-parts", {"factor": 1.47, "original": 2048}),
        (BASE, 16384, "ntk-by-parts", {"factor": 8.0}),
        (YARN, 8192, "yarn", {"factor": 4.0}),
        (YARN, 16384, "yarn", {"factor": 8.0, "original": 2048}),
        (LLAMA3, 16384, "llama3", {"factor": 8.0, "original": 2048}),
        (DYNAMIC, 100_000, "dynamic", {"factor": 2.0}),
        (LINEAR, 4096, "linear", {"factor": 4.0}),
        (LINEAR, 16384, "linear+ntk", {"factor": 4.0, "alpha": 2.0}),
        (PARTS, 16384, "ntk-by-parts", {"factor": 8.0, "original": 2048}),
    ],
)
def test_the_rule_chooses(config: dict, seq_len: int | None, method: str, values: dict) -> None:
    rope = rope_as_given(config, seq_len, rope_scaling="auto")
    assert rope.method.name == method and rope.decided_by.startswith("rope_scaling=auto (")
    assert {name: getattr(rope.method, name) for name in values} == values
    assert seq_len is None or rope.covers is None or rope.covers >= seq_len


def test_the_choice_is_logged_in_one_sentence_that_says_how_to_overrule_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        rope_as_given(BASE, 8192, rope_scaling="auto")
    (record,) = [record for record in caplog.records if "auto" in record.message]
    assert "8192 positions are asked for, and the checkpoint covers 2048" in record.message
    assert "overrule it with rope_scaling, compress_pos_emb or alpha_value" in record.message
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_base_is_kept_beside_it() -> None:
    assert rope_as_given(BASE, 8192, rope_scaling="auto", rope_theta=5e5).theta == 5e5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rope_scaling": "yarn"}, "must be an object, 'auto' or None, got 'yarn'"),
        ({"rope_scaling": "auto", "alpha_value": 2.0}, "give one or the other"),
    ],
)
def test_what_contradicts_it_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_as_given(BASE, 8192, **options)


def test_an_adapter_is_needed_where_the_checkpoint_covers_too_little() -> None:
    assert covered_without(YARN, 8192, "config.json") and covered_without(DYNAMIC, 8192, "config.json")
    assert not covered_without(BASE, 8192, "config.json") and not covered_without(BASE, None, "config.json")
