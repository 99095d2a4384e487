"""Fields of the web UI: their values as text, as a config.json declares them, and as arguments that load a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.base.errors import ConfigError
from ropewalk.faces.webui.model_settings import (
    declared_settings,
    describe,
    load_options,
    multiplied_scalings,
    speculation,
)
from ropewalk.faces.webui.parameters import PARAMETERS, Choice, name_here, read_all
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.backend_choice import choose_backend
from ropewalk.model.options import OPTION_NAMES, ROPE_NAMES, LoadOptions
from ropewalk.model.plan import plan_loading
from ropewalk.rope.rope import Rope

BY_NAME = {item.name: item for item in PARAMETERS}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another theta": {"rope_theta": 1234567.8},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "a factor with many digits": {"rope_scaling": {"type": "linear", "factor": 8 / 3}},
    "ntk": {"rope_scaling": {"type": "ntk", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn with more": {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 256}},
    "airophin": {"max_position_embeddings": 8192, "original_max_position_embeddings": 2048},
    "superhot": {"max_position_embeddings": 8192, "auto_map": {"AutoModelForCausalLM": "modelling_llama.Llama"}},
    "a layer order": {"layer_order": "0-3,2-4"},
}


def write_config(folder: Path, changes: dict[str, Any]) -> Path:
    """A folder with the embedded model's declarations, changed; without weights."""
    config = json.loads((demo_model_path() / "config.json").read_text())
    for key in ("rope_parameters", "quantization_config"):
        config.pop(key, None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "quantize_config.json").write_text((demo_model_path() / "quantize_config.json").read_text())
    return folder


def rope_of(folder: Path, values: dict[str, Any]) -> Rope:
    """What is decided with these values in the fields."""
    return plan_loading(folder, load_options(folder, values)).rope


def changed(options: LoadOptions) -> dict[str, Any]:
    """The options that differ from the defaults, by name."""
    values = {name: getattr(options, name) for name in OPTION_NAMES}
    return {name: value for name, value in values.items() if value != getattr(LoadOptions(), name)}


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_that_were_only_filled_override_nothing(tmp_path: Path, name: str) -> None:
    folder = write_config(tmp_path, CONFIGS[name])
    declared = declared_settings(folder)
    options = load_options(folder, declared)
    assert changed(options) == {"max_seq_len": declared["ctx_size"]}
    assert rope_of(folder, declared) == rope_of(folder, {})


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_may_round_what_they_show(tmp_path: Path, name: str) -> None:
    folder = write_config(tmp_path, CONFIGS[name])
    shown = {
        field: round(value, 2) if isinstance(value, float) else value
        for field, value in declared_settings(folder).items()
    }
    assert not load_options(folder, shown).has_rope


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("plain", {"compress_pos_emb": 1.0, "alpha_value": 1.0, "rope_method": "config", "rope_freq_base": 10000}),
        ("another theta", {"rope_freq_base": 1234568}),
        ("linear", {"compress_pos_emb": 4.0, "rope_method": "config", "rope_factor": 1.0}),
        ("ntk", {"alpha_value": 4.0, "rope_method": "config"}),
        ("yarn with more", {"rope_method": "yarn", "rope_factor": 4.0, "compress_pos_emb": 1.0}),
        ("llama3", {"rope_method": "llama3", "rope_factor": 8.0}),
        ("airophin", {"rope_method": "ntk-by-parts", "rope_factor": 4.0, "ctx_size": 8192}),
        ("superhot", {"compress_pos_emb": 4.0, "ctx_size": 8192}),
        ("a layer order", {"layer_order": "0-3,2-4"}),
    ],
)
def test_fields_show_what_config_json_declares(tmp_path: Path, config: str, expected: dict[str, Any]) -> None:
    declared = declared_settings(write_config(tmp_path, CONFIGS[config]))
    assert {name: declared[name] for name in expected} == expected


def test_a_very_long_declared_context_is_not_filled_in(tmp_path: Path) -> None:
    folder = write_config(tmp_path, {"max_position_embeddings": 131072})
    assert declared_settings(folder)["ctx_size"] == 32768
    assert load_options(folder, {"ctx_size": 131072}).max_seq_len == 131072


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        ("plain", {"compress_pos_emb": 4}, {"compress_pos_emb": 4.0, "alpha_value": 1.0}),
        ("plain", {"alpha_value": "2.5"}, {"compress_pos_emb": 1.0, "alpha_value": 2.5}),
        ("linear", {"compress_pos_emb": 1}, {"compress_pos_emb": 1.0, "alpha_value": 1.0}),
        ("linear", {"alpha_value": 2}, {"compress_pos_emb": 4.0, "alpha_value": 2.0}),
        ("plain", {"rope_freq_base": 26000}, {"rope_theta": 26000.0}),
        ("plain", {"rope_freq_base": 0}, {}),
        ("plain", {"rope_method": "yarn", "rope_factor": 4}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("linear", {"rope_method": "default"}, {"rope_scaling": {"rope_type": "default"}}),
        ("airophin", {"rope_factor": 8}, {"rope_scaling": {"rope_type": "ntk-by-parts", "factor": 8.0}}),
        ("yarn with more", {"rope_method": "config"}, {}),
        ("yarn with more", {"rope_method": "linear"}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("yarn with more", {"rope_factor": 8}, {"rope_scaling": {"type": "yarn", "factor": 8.0, "beta_fast": 16.0}}),
    ],
)
def test_a_field_that_was_changed_overrides(
    tmp_path: Path, config: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder = write_config(tmp_path, CONFIGS[config])
    options = load_options(folder, declared_settings(folder) | changes)
    assert {name: value for name, value in changed(options).items() if name in ROPE_NAMES} == expected
    rope_of(folder, declared_settings(folder) | changes)


def test_changing_llama3s_factor_keeps_its_other_parameters(tmp_path: Path) -> None:
    folder = write_config(tmp_path, CONFIGS["llama3"])
    method = rope_of(folder, declared_settings(folder) | {"rope_factor": 16}).method
    assert (method.factor, method.low_freq_factor, method.original) == (16.0, 1.0, 256)


def test_a_factor_without_a_method_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, {})
    with pytest.raises(ConfigError, match="rope_factor=4 needs rope_method"):
        load_options(folder, {"rope_factor": 4})


def test_a_method_and_a_knob_together_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, {})
    with pytest.raises(ConfigError, match="rope_scaling replaces the whole scaling"):
        rope_of(folder, {"rope_method": "yarn", "rope_factor": 2, "compress_pos_emb": 2})


def test_values_become_the_arguments_of_loading(tmp_path: Path) -> None:
    values = {"chunk_size": 64, "compute_mode": "exact", "threads": 2, "layer_order": "0-2", "cache_type": "fp32"}
    options = load_options(write_config(tmp_path, {}), values)
    assert changed(options) == {
        **{"max_seq_len": 512, "max_input_len": 64, "compute": "exact"},
        **{"threads": 2, "layer_order": "0-2", "cache_type": "fp32"},
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (None, None)),
        ({"speculation": "none", "model_draft": "None"}, (None, None)),
        ({"speculation": "", "model_draft": None}, (None, None)),
        ({"speculation": "ngram", "model_draft": "None"}, ("ngram", None)),
        ({"speculation": "draft", "model_draft": "small"}, ("draft", "small")),
        ({"speculation": "none", "model_draft": "small"}, ("draft", "small")),
    ],
)
def test_who_guesses_ahead_is_read_from_two_fields(values: dict[str, Any], expected: tuple[str | None, ...]) -> None:
    assert speculation(values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speculation": "draft"}, "speculation=draft needs a model_draft"),
        ({"speculation": "ngram", "model_draft": "small"}, "model_draft=small has no effect with speculation=ngram"),
        ({"speculation": "magic"}, "speculation must be one of none, ngram, draft"),
    ],
)
def test_fields_of_guessing_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        speculation(values)


def test_values_by_the_names_of_older_versions_are_read() -> None:
    assert read_all({"max_seq_len": 1024, "n_gpu_layers": 3})["ctx_size"] == 1024
    assert name_here(BY_NAME["ctx_size"], {"max_seq_len", "threads"}) == "max_seq_len"
    assert name_here(BY_NAME["ctx_size"], {"max_seq_len", "ctx_size"}) == "ctx_size"
    assert name_here(BY_NAME["layer_order"], {"threads"}) == "layer_order"


def test_an_absent_and_an_empty_field_mean_what_the_model_declares(tmp_path: Path) -> None:
    folder = write_config(tmp_path, CONFIGS["superhot"])
    options = load_options(folder, declared_settings(folder))
    assert load_options(folder, {}) == options
    assert load_options(folder, dict.fromkeys(BY_NAME)) == options
    assert load_options(folder, dict.fromkeys(BY_NAME, "")) == options


@pytest.mark.parametrize("value", ["nan", float("inf"), "-Infinity"])
def test_a_number_must_be_finite(value: Any) -> None:
    item = next(item for item in PARAMETERS if isinstance(item.default, float))
    with pytest.raises(ConfigError, match=f"{item.name} must be a number, got"):
        item.read(value)


@settings(deadline=None)
@given(
    value=st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.lists(st.integers())),
    index=st.integers(0, len(PARAMETERS) - 1),
)
def test_a_value_is_read_with_its_type_or_refused_by_name(value: Any, index: int) -> None:
    item = PARAMETERS[index]
    try:
        read = item.read(value)
    except ConfigError as error:
        assert str(error).startswith(f"{item.name} must be ")
        return
    assert type(read) is type(item.default)
    closed = isinstance(item.widget, Choice) and not item.widget.is_open
    assert not closed or read in item.widget.choices
    assert item.read(read) == read
    assert item.read(str(read)) == read


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ctx_size", "many", "ctx_size must be a whole number, got 'many'"),
        ("ctx_size", 10.5, "ctx_size must be a whole number, got 10.5"),
        ("alpha_value", [1], r"alpha_value must be a number, got \[1\]"),
        ("compute_mode", "fast", "compute_mode must be one of auto, int8, fp16, exact, got 'fast'"),
        ("threads", True, "threads must be a whole number, got True"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BY_NAME[name].read(value)


def test_names_of_settings_are_words_that_flags_and_yaml_can_have() -> None:
    assert len({item.name for item in PARAMETERS}) == len(PARAMETERS)
    assert all(item.name.isidentifier() and item.info.endswith(".") for item in PARAMETERS)


def test_a_description_checks_the_tensors_and_says_the_decision() -> None:
    info = describe(demo_model_path(), {"ctx_size": 2048, "alpha_value": 4})
    assert "ntk, alpha 4" in info.rope and info.max_seq_len == 2048 and info.weight_bytes > 1e6


def test_both_scalings_set_say_that_they_multiply() -> None:
    text = multiplied_scalings(LoadOptions(compress_pos_emb=4, alpha_value=2.5))
    assert text is not None and "compress_pos_emb=4 and alpha_value=2.5" in text and "10 times" in text


@pytest.mark.parametrize("values", [{}, {"compress_pos_emb": 4}, {"alpha_value": 2, "compress_pos_emb": 1.0}])
def test_one_scaling_alone_multiplies_with_nothing(values: dict[str, Any]) -> None:
    assert multiplied_scalings(LoadOptions(**values)) is None


def test_a_stored_int8_goes_on_meaning_the_cpu() -> None:
    options = load_options(demo_model_path(), {"compute_mode": "int8"})
    assert (options.compute, options.backend) == ("int8", "auto")
    assert choose_backend(options).name == "cpu"


@pytest.mark.parametrize("value, wanted", [(-1, None), (1, 1), (0, 0), (256, None)])
def test_layers_on_the_gpu_are_a_number_or_all(value: int, wanted: int | None) -> None:
    assert load_options(demo_model_path(), {"gpu_layers": value}).gpu_layers == wanted


def test_the_backend_and_the_split_are_settings() -> None:
    options = load_options(demo_model_path(), {"backend": "gpu", "gpu_split": "10,20"})
    assert (options.backend, options.gpu_split) == ("gpu", "10,20")
    assert load_options(demo_model_path(), {"gpu_split": ""}).gpu_split is None
