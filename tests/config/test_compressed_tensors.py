"""config/compressed_tensors.py: which declarations are read, which are refused, and whose settings a module has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from container_writer import compressed_config
from gptq_writer import Kind
from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.config.quantisation import QuantConfig, QuantSettings, load_quant_config

W4 = QuantSettings(4, 128, False, True, "pack-quantized", False)
BASE = compressed_config(Kind(group_size=128))


def load(folder: Path, key: str = "quantization_config", **changes: Any) -> QuantConfig:
    """The settings of BASE with other values; "a.b" names a key within an object, WEIGHTS that of the group."""
    declaration = copy.deepcopy(BASE)
    for path, value in changes.items():
        place, names = declaration, path.split("__")
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value
    found = load_quant_config(folder, {key: declaration})
    assert found is not None
    return found


WEIGHTS = "config_groups__group_0__weights"
GROUP = "config_groups__group_0"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_one_group_is_the_setting_of_every_linear(tmp_path: Path, key: str) -> None:
    config = load(tmp_path, key)
    assert config.for_module("model.layers.0.mlp.up_proj") == W4
    assert config.for_module("lm_head") is None
    assert (config.source, config.declared) == (str(tmp_path / "config.json"), True)


def test_a_head_that_is_not_ignored_is_quantised(tmp_path: Path) -> None:
    assert load(tmp_path, ignore=[]).for_module("lm_head") == W4


def test_a_name_counts_before_a_pattern_and_that_before_the_class(tmp_path: Path) -> None:
    groups = {
        "a": compressed_config(Kind(bits=8, group_size=-1))["config_groups"]["group_0"] | {"targets": ["re:.*mlp"]},
        "b": BASE["config_groups"]["group_0"],
        "c": BASE["config_groups"]["group_0"] | {"targets": ["model.layers.0.mlp.up_proj"], "weights": None},
    }
    config = load(tmp_path, config_groups=groups, ignore=["re:.*down"])
    found = {name: config.for_module(f"model.layers.0.mlp.{name}_proj") for name in ("up", "gate", "down")}
    assert found == {"up": None, "gate": QuantSettings(8, -1, False, True, "pack-quantized", False), "down": None}
    assert config.for_module("model.layers.0.self_attn.q_proj") == W4


def test_modules_that_no_group_speaks_of_are_dense(tmp_path: Path) -> None:
    config = load(tmp_path, **{f"{GROUP}__targets": ["re:.*mlp"]})
    assert config.for_module("model.layers.0.mlp.up_proj") == config.default == W4
    assert config.for_module("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("changes", "size"),
    [({"strategy": None}, 128), ({"strategy": None, "group_size": -1}, -1), ({"strategy": "GROUP"}, 128)],
)
def test_the_strategy_follows_from_the_size(tmp_path: Path, changes: dict[str, Any], size: int) -> None:
    assert load(tmp_path, **{f"{WEIGHTS}__{key}": value for key, value in changes.items()}).default.group_size == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "float-quantized"}, r"format 'float-quantized' \(8-bit floating-point .* vLLM, SGLang"),
        ({"format": "nvfp4-pack-quantized"}, r"'nvfp4-pack-quantized' \(4- or 8-bit floating-point .*TensorRT-LLM"),
        ({"format": "mxfp4-pack-quantized"}, "MXFP4.* vLLM"),
        ({"format": "int-quantized"}, "W8A8.* vLLM on a GPU"),
        ({"format": "marlin-24"}, "repacked for one kernel"),
        ({"format": "mixed-precision"}, "'mixed-precision' is not supported .*accepted is pack-quantized"),
        ({"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format .*zeros left out"),
        ({f"{GROUP}__input_activations": {"num_bits": 8}}, "group_0.input_activations .*weights alone"),
        ({f"{GROUP}__output_activations": {"num_bits": 8}}, "group_0.output_activations"),
        ({f"{GROUP}__format": "naive-quantized"}, "group_0.format 'naive-quantized'"),
        ({f"{WEIGHTS}__type": "float"}, "weights.type 'float' .* accepted is int"),
        ({f"{WEIGHTS}__num_bits": 3}, "num_bits 3 .* accepted is 2, 4, 8"),
        ({f"{WEIGHTS}__dynamic": True}, "weights.dynamic True"),
        ({f"{WEIGHTS}__strategy": "block"}, "strategy 'block' .* group or channel"),
    ],
)
def test_what_is_not_packed_integer_weights_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format must be pack-quantized, found nothing"),
        ({"config_groups": {}}, "config_groups must be an object with at least one group"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 must be an object"),
        ({"ignore": "lm_head"}, "ignore must be a list"),
        ({"ignore": ["re:(.+)+!"]}, "ignore 're:.* is not a regular expression that can be used"),
        ({f"{GROUP}__targets": [4]}, "group_0.targets must be a list"),
        ({f"{GROUP}__weights": None}, "config_groups quantises no weights"),
        ({f"{WEIGHTS}__group_size": 0}, "weights.group_size must be"),
        ({f"{WEIGHTS}__strategy": "channel"}, "group_size must be null with strategy channel"),
        (
            {f"{WEIGHTS}__strategy": None, f"{WEIGHTS}__group_size": None},
            "group_size must be a number of .*, or -1",
        ),
        ({f"{WEIGHTS}__actorder": "sideways"}, "actorder must be null or one of group, dynamic, weight, static"),
        ({f"{WEIGHTS}__symmetric": "yes"}, "symmetric must be true or false"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["Linear", "re:a", "re:(", "group"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weights", "targets", "a"]), inner),
    max_leaves=5,
)
PLACES = [
    *("format", "config_groups", "ignore", "quantization_status", "kv_cache_scheme", "sparsity_config", GROUP),
    *(f"{GROUP}__{key}" for key in ("targets", "weights", "input_activations", "format")),
    *(f"{WEIGHTS}__{key}" for key in BASE["config_groups"]["group_0"]["weights"]),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), ANYTHING)
def test_any_value_anywhere_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: Any
) -> None:
    try:
        config = load(tmp_path_factory.getbasetemp(), **{place: value})
    except RopewalkError:
        return
    assert config.for_module("model.layers.0.mlp.up_proj") in (None, config.default)
