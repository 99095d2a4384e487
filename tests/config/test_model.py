"""config/model.py: what a config.json says, checked against transformers' own configuration classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.config.model import FAMILIES, ModelConfig, load_model_config, parse_model_config

BASE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A small config.json of a family; a change to `...` removes the key."""
    merged = {"model_type": family, "architectures": [FAMILIES[family].architectures[0]], **BASE, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def parse(**changes: Any) -> ModelConfig:
    return parse_model_config(config(**changes), "folder/config.json")


def write(folder: Path, values: dict[str, Any], name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


TRANSFORMERS_CASES = [
    config("llama"),
    config("llama", num_key_value_heads=..., rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True),
    config("llama", head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None),
    config("llama", num_key_value_heads=None, eos_token_id=[3, 4]),
    config("mistral"),
    config("mistral", num_key_value_heads=..., sliding_window=None),
    config("mistral", sliding_window=32, head_dim=48, eos_token_id=None),
    config("qwen2"),
    config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
    config("qwen2", use_sliding_window=True, sliding_window=16),
    config("qwen2", use_sliding_window=True, max_window_layers=0),
    config("qwen2", use_sliding_window=False, sliding_window=16, max_window_layers=2),
    config("qwen2", use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 2),
    config("qwen3"),
    config("qwen3", head_dim=64, attention_bias=True, use_sliding_window=True, max_window_layers=3),
    config("qwen3", num_attention_heads=64, num_key_value_heads=...),
]


@pytest.mark.parametrize("raw", TRANSFORMERS_CASES, ids=lambda raw: f"{raw['model_type']}-{len(raw)}")
def test_fields_agree_with_the_configuration_class_of_transformers(raw: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**{**raw, "architectures": raw["architectures"]})
    ours = parse_model_config(raw, "config.json")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    eos = theirs.eos_token_id
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == head_dim
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize("raw", TRANSFORMERS_CASES, ids=lambda raw: f"{raw['model_type']}-{len(raw)}")
def test_windows_and_biases_agree_with_the_modules_of_transformers(raw: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    ours = parse_model_config(raw, "config.json")
    for layer, window in zip(model.model.layers, ours.sliding_windows, strict=True):
        attention = layer.self_attn
        theirs = (
            attention.config.sliding_window if ours.family == "mistral" else getattr(attention, "sliding_window", None)
        )
        assert window == theirs
        assert ("qkv_bias" in ours.flags) == (attention.q_proj.bias is not None) == (attention.v_proj.bias is not None)
        assert ("o_bias" in ours.flags) == (attention.o_proj.bias is not None)
        assert (
            ("mlp_bias" in ours.flags) == (layer.mlp.down_proj.bias is not None) == (layer.mlp.up_proj.bias is not None)
        )
        assert ("qk_norm" in ours.flags) == hasattr(attention, "q_norm")


def test_a_window_hides_the_keys_that_it_hides_in_transformers() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    torch = pytest.importorskip("torch")
    i, j = torch.arange(8)[:, None], torch.arange(8)[None]
    visible = masking.sliding_window_causal_mask_function(3)(0, 0, i, j)  # [8, 8]
    assert torch.equal(visible, (i - 3 < j) & (j <= i))


def test_a_llama_conversion_of_march_2023_is_read(caplog: pytest.LogCaptureFixture) -> None:
    raw = {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_sequence_length": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
        "vocab_size": 32000,
    }
    with caplog.at_level(logging.WARNING):
        ours = parse_model_config(raw, "config.json")
    assert (ours.family, ours.num_kv_heads, ours.head_dim, ours.max_position_embeddings) == ("llama", 32, 128, 2048)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert "known mistake" in caplog.text


def test_max_sequence_length_stands_in_for_max_position_embeddings() -> None:
    assert parse(max_sequence_length=512).max_position_embeddings == 512
    assert parse(max_sequence_length=512, max_position_embeddings=1024).max_position_embeddings == 1024


@pytest.mark.parametrize("name", ["gemma3", "phimoe", "gpt2", "falcon", "deepseek_v3", "opt", "bloom"])
def test_another_model_type_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"folder/config.json: model_type '{name}'.*llama.*mistral.*qwen2.*qwen3"
    ):
        parse_model_config({"model_type": name}, "folder/config.json")


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [(None, "FalconForCausalLM"), ("llama", "LlamaForSequenceClassification"), ("llama", "MistralForCausalLM")],
)
def test_another_architecture_is_refused_by_name(model_type: str | None, architecture: str) -> None:
    raw = {**config(), "model_type": model_type, "architectures": [architecture]}
    with pytest.raises(UnsupportedError, match=f"'{architecture}'.*LlamaForCausalLM"):
        parse_model_config(raw, "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_known_from_the_architecture_alone(family: str) -> None:
    assert parse_model_config({**config(family), "model_type": None}, "config.json").family == family


def test_a_config_that_names_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither model_type nor architectures"):
        parse_model_config(BASE, "config.json")


@pytest.mark.parametrize("activation", ["relu", "relu2", "quick_gelu"])
def test_another_activation_is_refused_by_name(activation: str) -> None:
    with pytest.raises(UnsupportedError, match=f"hidden_act '{activation}'.*silu"):
        parse(hidden_act=activation)


WRONG_VALUES = [
    *[(key, value) for key in BASE for value in (0, -1, 10**12, True, "64", 64.5, [64], {})],
    *[(key, ...) for key in BASE if key != "num_key_value_heads"],
    ("num_attention_heads", 7),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 16),
    ("head_dim", 33),
    ("head_dim", 0),
    ("head_dim", 10**6),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", 10**400),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", 2048.5),
    ("max_position_embeddings", 10**30),
    ("tie_word_embeddings", 1),
    ("tie_word_embeddings", "true"),
    ("attention_bias", "no"),
    ("mlp_bias", 0),
    ("bos_token_id", -1),
    ("bos_token_id", 1.0),
    ("eos_token_id", "2"),
    ("eos_token_id", [2, True]),
    ("eos_token_id", -5),
    ("hidden_act", 3),
    ("model_type", 7),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [1]),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=lambda value: repr(value)[:24])
def test_a_wrong_value_is_refused_with_file_and_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"folder/config\.json: .*{key}"):
        parse(**{key: value})


def test_the_message_for_a_wrong_value_says_what_is_accepted_and_what_was_found() -> None:
    with pytest.raises(ConfigError, match=r"num_hidden_layers must be an integer from 1 to 4096, found '32'"):
        parse(num_hidden_layers="32")
    with pytest.raises(ConfigError, match=r"vocab_size must be .*, found nothing"):
        parse(vocab_size=...)


def test_an_odd_head_size_is_refused_also_when_it_is_derived() -> None:
    with pytest.raises(ConfigError, match="head size .* must be even .* found 33"):
        parse(hidden_size=264)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 4 times"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types must be a list of 4 times"),
        ({"layer_types": [None] * 4}, "layer_types must be a list of 4 times"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window must be true"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be an integer"),
        ({"use_sliding_window": 1}, "use_sliding_window must be true or false"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers must be an integer"),
    ],
)
def test_contradicting_windows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(family="qwen2", **changes)


def test_mistral_with_layers_of_two_kinds_is_refused() -> None:
    mixed = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(UnsupportedError, match="layer_types .* mistral"):
        parse(family="mistral", layer_types=mixed)
    assert parse(family="mistral", layer_types=["sliding_attention"] * 4).sliding_windows == (4096,) * 4


def test_token_ids_outside_the_vocabulary_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    ours = parse(bos_token_id=1000, eos_token_id=[5, 2000])
    assert (ours.bos_token_id, ours.eos_token_ids) == (None, (5,))
    assert "bos_token_id 1000 is not" in caplog.text
    assert "eos_token_id 2000 is not" in caplog.text


def test_end_tokens_of_generation_config_are_added(tmp_path: Path) -> None:
    write(tmp_path, config(eos_token_id=2))
    write(tmp_path, {"eos_token_id": [7, 2]}, "generation_config.json")
    assert load_model_config(tmp_path).eos_token_ids == (2, 7)


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    write(tmp_path, config())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id"):
        load_model_config(tmp_path)


def test_the_raw_config_is_kept_and_cannot_be_changed(tmp_path: Path) -> None:
    loaded = load_model_config(write(tmp_path, config(rope_theta=5e5)))
    assert loaded.raw["rope_theta"] == 5e5
    assert loaded.source == str(tmp_path / "config.json")
    with pytest.raises(TypeError):
        loaded.raw["rope_theta"] = 1.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"hidden_size": 25', "not valid JSON.*truncated"),
        (b"[1, 2]", "must hold a JSON object, found list"),
        (b"null", "must hold a JSON object, found None"),
        (b'{"hidden_size": "\xff"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply|not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON|hidden_size"),
    ],
)
def test_a_damaged_config_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_one_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config()).encode())
    assert load_model_config(tmp_path).hidden_size == 256


def test_a_missing_folder_a_file_and_a_folder_without_config_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: give the folder"):
        load_model_config(tmp_path / "nowhere")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file: give the folder"):
        load_model_config(weights)
    with pytest.raises(ConfigError, match=r"has no config.json \(found: model.safetensors\)"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model_config(tmp_path)


# Values as damaged or hostile files hold them, near and far from the good ones.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["silu", "llama", "qwen2", "sliding_attention", 10**12, 10**5000, 1e308]),
    st.lists(st.one_of(st.integers(-1, 5), st.none(), st.text(max_size=2), st.just("full_attention")), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
KEYS = [
    *BASE,
    *["model_type", "architectures", "hidden_act", "head_dim", "rms_norm_eps", "max_position_embeddings"],
    *["sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings"],
    *["attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "max_sequence_length"],
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_any_mangled_config_gives_a_sound_object_or_a_named_error(family: str, mangled: dict[str, Any]) -> None:
    try:
        ours = parse_model_config({**config(family), **mangled}, "config.json")
    except RopewalkError as error:
        assert str(error).startswith("config.json")
        return
    assert ours.num_heads % ours.num_kv_heads == 0
    assert ours.head_dim % 2 == 0
    assert 0 < ours.norm_eps <= 1
    assert len(ours.sliding_windows) == ours.num_layers
    assert all(0 <= token < ours.vocab_size for token in ours.eos_token_ids)
