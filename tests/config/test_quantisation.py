"""config/quantisation.py: what the files of a folder declare about quantisation, in every spelling."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import gptq_fixture_folders
from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import QuantConfig, QuantSettings, load_quant_config

GPTQ: dict[str, Any] = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True, "quant_method": "gptq"}


def load(folder: Path, nested: Any = None, **files: dict[str, Any]) -> QuantConfig | None:
    """Write `files` (by name without .json) and read them beside a config.json with the nested declaration."""
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return load_quant_config(folder, {} if nested is None else {"quantization_config": nested})


def declared(folder: Path, nested: Any = None, **files: dict[str, Any]) -> QuantConfig:
    config = load(folder, nested, **files)
    assert config is not None
    return config


def test_nothing_declared_is_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    assert load(tmp_path, {}) is None
    assert load_quant_config(tmp_path, {"quantization_config": None}) is None


def test_the_keys_of_config_json_are_read(tmp_path: Path) -> None:
    config = declared(tmp_path, GPTQ)
    assert config.default == QuantSettings(4, 128, True, True, "gptq", False)
    assert config.source == str(tmp_path / "config.json")
    assert (config.rules, config.lm_head, config.model_file_base_name, config.declared) == ((), False, None, True)


@pytest.mark.parametrize("name", ["quantize_config", "quant_config"])
def test_a_file_of_its_own_is_read_also_without_a_method(tmp_path: Path, name: str) -> None:
    config = declared(tmp_path, **{name: {"bits": 3, "group_size": 64}})
    assert config.default == QuantSettings(3, 64, False, True, "gptq", False)
    assert config.source == str(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "spelling",
    [
        {"wbits": 8, "groupsize": 32},
        {"w_bit": 8, "q_group_size": 32},
        {"gptq_bits": 8, "gptq_groupsize": 32, "gptq_sym": True},
        {"bits": 8, "group_size": 32, "method": "GPTQ", "format": "gptq", "pack_dtype": "torch.int32"},
        {"bits": 8, "group_size": 32, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        {"bits": 8, "group_size": 32, "quant_method": "intel/auto-round", "packing_format": "auto_round:auto_gptq"},
    ],
)
def test_every_spelling_of_the_keys_is_read(tmp_path: Path, spelling: dict[str, Any]) -> None:
    default = declared(tmp_path, quantize_config=spelling).default
    assert (default.bits, default.group_size, default.sym, default.format) == (8, 32, True, "gptq")


def test_the_keys_of_koboldai_in_config_json_are_read(tmp_path: Path) -> None:
    config = load_quant_config(tmp_path, {"gptq_bits": 4, "gptq_groupsize": -1, "gptq_version": 1, "hidden_size": 64})
    assert config is not None
    assert (config.default.bits, config.default.group_size) == (4, -1)


def test_a_null_group_size_is_one_group(tmp_path: Path) -> None:
    assert declared(tmp_path, {**GPTQ, "group_size": None}).default.group_size == -1


def test_config_json_wins_over_quantize_config_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = declared(tmp_path, GPTQ, quantize_config={**GPTQ, "group_size": 32, "damp_percent": 0.1})
    assert config.default.group_size == 128
    assert len(caplog.records) == 1
    assert "quantization_config.group_size says 128" in caplog.text
    assert "quantize_config.json: group_size says 32" in caplog.text


def test_a_key_that_config_json_lacks_comes_from_quantize_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = {**GPTQ, "checkpoint_format": "gptq_v2", "model_file_base_name": "gptq_model-4bit-128g"}
    config = declared(tmp_path, GPTQ, quantize_config=other)
    assert config.default.format == "gptq_v2"
    assert config.model_file_base_name == "gptq_model-4bit-128g"
    assert not caplog.records


@pytest.mark.parametrize(
    ("meta", "format_name", "borrows"),
    [
        ({"quantizer": ["gptqmodel:7.7.0"]}, "gptq", True),
        ({"quantizer": "GPTQModel:1.0"}, "gptq", True),
        ({"quantizer": ["gptqmodel:7.7.0"]}, "gptq_v2", False),
        ({"quantizer": ["autogptq:0.7"]}, "gptq", False),
        ({"quantizer": None}, "gptq", False),
        ({"quantizer": 3}, "gptq", False),
        ({}, "gptq", False),
        (None, "gptq", False),
    ],
)
def test_only_v1_files_of_gptqmodel_borrow_across_words(
    tmp_path: Path, meta: Any, format_name: str, borrows: bool
) -> None:
    config = declared(tmp_path, {**GPTQ, "checkpoint_format": format_name, "meta": meta})
    assert config.default.word_borrow is borrows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "new"}, "quant_method 'new' is not supported; accepted is gptq, awq or compressed-tensors"),
        ({"quant_method": "marlin"}, "'marlin' .* repacked from"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' .*transformers with bitsandbytes runs it"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": "fp8"}, r"'fp8' \(8-bit floating-point \(FP8\) weights\) .*vLLM, SGLang or transformers"),
        ({"quant_method": "mxfp4"}, r"'mxfp4' \(4- or 8-bit floating-point .*llama.cpp"),
        ({"quant_method": "modelopt"}, "NVFP4"),
        ({"quant_method": "hqq"}, "'hqq' .*transformers with hqq runs it"),
        ({"quant_method": "exl2"}, "'exl2' .*exllamav2 .* on a GPU runs it"),
        ({"quant_method": "aqlm"}, "'aqlm' .*transformers with aqlm"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' .* accepted is gemm"),
        ({"quant_method": "awq", "bits": 8}, "bits 8 is not supported in format awq; accepted are 4"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' .*gptq, gptq_v2, gptq_p: .*repacked from"),
        ({"checkpoint_format": "bitblas"}, "'bitblas' .* repacked from"),
        ({"format": "gemm"}, "format 'gemm'"),
        ({"is_marlin_format": True}, "is_marlin_format is true"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16' .* int32"),
        ({"quant_method": None, "version": "GEMV"}, "'GEMV' .* AWQ"),
        ({"quant_method": None, "load_in_4bit": True}, "load_in_4bit True .* bitsandbytes"),
        ({"quant_method": "auto-round"}, "'auto-round' .* export it again .* auto_gptq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptq_v9"}, "'auto_round:gptq_v9'"),
        ({"bits": 5}, "bits 5 is not supported in format gptq; accepted are 2, 3, 4, 8"),
        ({"bits": 16}, "bits 16 is not supported"),
        ({"bits": 1, "checkpoint_format": "gptq_p"}, "bits 1 .* 2, 3, 4, 5, 6, 7, 8"),
    ],
)
def test_another_layout_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path, {**GPTQ, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": "4"}, r"config.json: quantization_config.bits must be an integer .* found '4'"),
        ({"bits": True}, "quantization_config.bits must be"),
        ({"bits": None}, r"bits must be 2, 3, 4 or 8"),
        ({"bits": 0}, "quantization_config.bits must be"),
        ({"group_size": 0}, "group_size must be -1"),
        ({"group_size": -2}, "group_size must be"),
        ({"group_size": 10**9}, "group_size must be"),
        ({"group_size": 128.0}, "group_size must be"),
        ({"desc_act": 1}, "desc_act must be true or false"),
        ({"sym": "yes"}, "sym must be true or false"),
        ({"lm_head": "no"}, "lm_head must be true or false"),
        ({"quant_method": 4}, "quant_method must be a string"),
        ({"meta": []}, "meta must be an object"),
        ({"dynamic": ["a"]}, "dynamic must be an object"),
        ({"dynamic": {"(": {}}}, r"dynamic.\( is not a regular expression"),
        ({"dynamic": {"a": 4}}, "dynamic.a must be an object"),
        ({"dynamic": {"a": {"bits": "8"}}}, "dynamic.a.bits must be"),
        ({"model_file_base_name": "../other"}, "model_file_base_name must be a file name without folders"),
        ({"model_file_base_name": 5}, "model_file_base_name must be a string"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {**GPTQ, **changes})


def test_a_missing_group_size_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="group_size is missing.*inferred from the shapes"):
        load(tmp_path, {"bits": 4, "quant_method": "gptq"})


def test_a_declaration_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json: quantization_config must be an object"):
        load(tmp_path, [GPTQ])
    (tmp_path / "quantize_config.json").write_text('{"bits": 4')
    with pytest.raises(ConfigError, match="quantize_config.json is not valid JSON"):
        load(tmp_path, GPTQ)


def test_a_base_name_loses_its_extension(tmp_path: Path) -> None:
    assert declared(tmp_path, {**GPTQ, "model_file_base_name": "a.safetensors"}).model_file_base_name == "a"


def test_the_first_matching_rule_decides_a_module(tmp_path: Path) -> None:
    rules = {
        r"-:.*\.down_proj$": {},
        r"+:model\.layers\.0\.": {"bits": 8, "group_size": 32},
        r".*self_attn": {"bits": 2, "sym": False},
        r"model\.layers": {"desc_act": False},
    }
    config = declared(tmp_path, {**GPTQ, "dynamic": rules})
    assert config.for_module("model.layers.0.mlp.down_proj") is None
    assert config.for_module("model.layers.0.self_attn.q_proj") == QuantSettings(8, 32, True, True, "gptq", False)
    assert config.for_module("model.layers.1.self_attn.q_proj") == QuantSettings(2, 128, True, False, "gptq", False)
    assert config.for_module("model.layers.1.mlp.up_proj") == QuantSettings(4, 128, False, True, "gptq", False)
    assert config.for_module("visual.blocks.0") == config.default


def test_a_rule_matches_from_the_start_of_the_name_as_re_match_does(tmp_path: Path) -> None:
    config = declared(tmp_path, {**GPTQ, "dynamic": {"layers": {"bits": 8}}})
    assert config.for_module("model.layers.0.mlp.up_proj") == config.default


def test_no_rules_are_spelled_null_false_or_empty(tmp_path: Path) -> None:
    for nothing in (None, False, {}):
        assert declared(tmp_path, {**GPTQ, "dynamic": nothing}).rules == ()


def test_a_rule_may_not_change_the_layout(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="dynamic.a.checkpoint_format 'gptq_v2'"):
        load(tmp_path, {**GPTQ, "dynamic": {"a": {"checkpoint_format": "gptq_v2"}}})
    with pytest.raises(UnsupportedError, match="dynamic.a.bits 6"):
        load(tmp_path, {**GPTQ, "dynamic": {"a": {"bits": 6}}})


def test_planar_files_with_one_plane_are_read_as_v2(tmp_path: Path) -> None:
    rules = {"a": {"bits": 6}, "b": {"bits": 8}, "c": {"bits": 3}}
    config = declared(tmp_path, {**GPTQ, "checkpoint_format": "gptq_p", "dynamic": rules})
    formats = {name: config.for_module(name) for name in ("a", "b", "c", "d")}
    assert {name: (found.bits, found.format) for name, found in formats.items() if found} == {
        "a": (6, "gptq_p"),
        "b": (8, "gptq_v2"),
        "c": (3, "gptq_p"),
        "d": (4, "gptq_v2"),
    }


def test_the_layers_that_auto_round_lists_have_their_own_settings(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "float"},
        "model.layers.1.mlp.up_proj": {"bits": 8},
    }
    nested = {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "extra_config": extra}
    config = declared(tmp_path, nested)
    assert config.for_module("model.layers.0.mlp.up_proj") is None
    found = config.for_module("model.layers.1.mlp.up_proj")
    assert found is not None
    assert found.bits == 8
    assert config.for_module("model.layers.1.mlp.up_proj_2") == config.default


def test_the_head_is_dense_unless_declared(tmp_path: Path) -> None:
    assert declared(tmp_path, GPTQ).for_module("lm_head") is None
    head = declared(tmp_path, {**GPTQ, "lm_head": True, "dynamic": {"lm_head": {"bits": 8, "group_size": 32}}})
    found = head.for_module("lm_head")
    assert found is not None
    assert (found.bits, found.group_size) == (8, 32)
    assert declared(tmp_path, {**GPTQ, "lm_head": True}).for_module("lm_head") == declared(tmp_path, GPTQ).default


@pytest.mark.skipif(not gptq_fixture_folders(), reason="no GPTQ fixtures on this machine")
def test_the_declarations_of_real_tools_are_read(gptq_fixture: Path) -> None:
    config = load_quant_config(gptq_fixture, load_model_config(gptq_fixture).raw)
    assert config is not None
    first = gptq_fixture.name.split("-")[0]  # the name starts with the tool and the bits
    assert config.default.bits == int(first[-1])


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["gptq", "gptq_v2", "gptq_p", "int32", 10**5000, "auto_round:auto_gptq"]),
    st.lists(st.one_of(st.none(), st.text(max_size=2)), max_size=3),
    st.dictionaries(
        st.text("-+:.*([a", max_size=4),
        st.one_of(
            st.none(), st.integers(), st.dictionaries(st.sampled_from(["bits", "group_size"]), st.integers(0, 9))
        ),
        max_size=3,
    ),
)
KEYS = [
    *GPTQ,
    *["checkpoint_format", "format", "method", "packing_format", "pack_dtype", "is_marlin_format", "version"],
    *["dynamic", "extra_config", "lm_head", "meta", "model_file_base_name", "wbits", "load_in_4bit"],
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_any_mangled_declaration_gives_a_sound_object_or_a_named_error(tmp_path: Path, mangled: dict[str, Any]) -> None:
    try:
        config = load(tmp_path, {**GPTQ, **mangled})
    except RopewalkError as error:
        assert "config.json" in str(error)
        return
    assert config is not None
    for name in ("model.layers.0.mlp.up_proj", "lm_head", "a"):
        found = config.for_module(name)
        assert found is None or found.bits in (2, 3, 4, 5, 6, 7, 8)
        assert found is None or found.group_size == -1 or found.group_size > 0
