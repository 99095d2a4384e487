"""containers/compressed_tensors.py: GPTQ's codes on their side, zero points of both ages, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_weights import Q0, assert_reads_exactly, edit, first_layer, opened, read_state_dict, refusal
from container_writer import compressed_config, pack_fields, write_container
from gptq_writer import Kind, pack_rows, write_checkpoint
from ropewalk.base.errors import CheckpointError, UnsupportedError
from ropewalk.weights.check import check_tensors

KINDS = {
    "symmetric": Kind(),
    "asymmetric": Kind(sym=False),
    "asymmetric, zero points as bytes": Kind(sym=False, era=3),
    "group order": Kind(desc_act=True),
    "group order, asymmetric": Kind(desc_act=True, sym=False),
    "channel": Kind(bits=8, group_size=-1),
    "channel, asymmetric": Kind(bits=8, group_size=-1, sym=False),
    "8 bits in groups, bytes": Kind(bits=8, sym=False, era=3),
    "2 bits": Kind(bits=2, sym=False),
    "bfloat16": Kind(scales_dtype=torch.bfloat16),
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_is_a_column_of_gptqs_words(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8]))
    inputs, outputs = 16 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    codes = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 1 << bits, (inputs, outputs))
    assert np.array_equal(pack_fields(codes.T, bits).T, pack_rows(codes, bits))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_exactly(tmp_path: Path, name: str) -> None:
    assert_reads_exactly(tmp_path, write_container(tmp_path, "compressed-tensors", KINDS[name]))


def test_outputs_that_fill_no_whole_word_of_zero_points_are_read(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 10, "num_attention_heads": 4}
    kind = Kind(sym=False, group_size=8)
    exact = write_container(tmp_path, "compressed-tensors", kind, sizes)  # k_proj has 10 outputs
    assert_reads_exactly(tmp_path, exact)


@pytest.mark.parametrize("actorder", ["weight", "static", False])
def test_columns_that_lie_in_order_need_no_groups(tmp_path: Path, actorder: str | bool) -> None:
    declaration = compressed_config(Kind(), actorder=actorder)
    assert_reads_exactly(tmp_path, write_container(tmp_path, "compressed-tensors", declaration=declaration))


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_groups_that_are_declared_must_be_there(tmp_path: Path, actorder: str | bool) -> None:
    write_container(tmp_path, "compressed-tensors", declaration=compressed_config(Kind(), actorder=actorder))
    assert f"{Q0}.weight_g_idx is missing" in refusal(tmp_path)


def test_groups_that_were_never_set_mean_no_order(tmp_path: Path) -> None:
    declaration = compressed_config(Kind(), actorder="group")
    exact = write_container(tmp_path, "compressed-tensors", declaration=declaration)
    names = [name.removesuffix(".weight") for name in exact if name.endswith("_proj.weight")]
    sizes = {name: exact[f"{name}.weight"].shape[1] for name in names}
    edit(tmp_path, **{f"{name}.weight_g_idx": torch.full((size,), -1).int() for name, size in sizes.items()})
    assert_reads_exactly(tmp_path, exact)


def test_several_groups_and_ignored_modules_are_told_apart(tmp_path: Path) -> None:
    declaration = compressed_config(Kind())
    eight = compressed_config(Kind(bits=8, group_size=-1))["config_groups"]["group_0"]
    declaration["config_groups"]["group_1"] = eight | {"targets": ["re:.*down_proj$"]}
    declaration["ignore"] += [Q0]
    exact = write_container(tmp_path, "compressed-tensors", declaration=declaration)
    others = tmp_path / "8 bits"
    exact_8 = write_container(others, "compressed-tensors", Kind(bits=8, group_size=-1))
    config, quant, checkpoint = opened(others)
    parts = ("weight_packed", "weight_scale", "weight_shape")
    down = [name.removesuffix(".weight") for name in exact if "down_proj" in name]
    moved = {f"{name}.{part}": checkpoint.tensor(f"{name}.{part}") for name in down for part in parts}
    dense = exact[f"{Q0}.weight"].half()
    removed = {f"{Q0}.{part}": None for part in parts}
    edit(tmp_path, **moved, **removed, **{f"{Q0}.weight": dense})
    expected = exact | {f"{name}.weight": exact_8[f"{name}.weight"] for name in down}
    assert_reads_exactly(tmp_path, expected | {f"{Q0}.weight": dense.float()})


def test_gptq_weights_that_are_declared_as_compressed_tensors_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"quantization_config": compressed_config(Kind())}, config_files=())
    config, quant, checkpoint = opened(tmp_path)
    with pytest.raises(UnsupportedError, match="qweight belongs to GPTQ or AWQ, but .*config.json says compressed"):
        check_tensors(config, quant, checkpoint)


@pytest.mark.parametrize("declaration", [{}, {"quant_method": "gptq", "bits": 4, "group_size": 32}])
def test_weights_that_nothing_declares_as_compressed_tensors_are_refused(tmp_path: Path, declaration: dict) -> None:
    write_container(tmp_path, "compressed-tensors", declaration=declaration)
    config, quant, checkpoint = opened(tmp_path)
    with pytest.raises(UnsupportedError, match="weight_packed belongs to compressed-tensors, but "):
        check_tensors(config, quant, checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_shape": None}, "weight_shape is missing"),
        ({"weight_zero_point": None}, "weight_zero_point is missing"),
        (
            {"weight_packed": torch.zeros(64, 16).int()},
            "weight_packed has shape [64, 16], expected [64, 8]: it",
        ),
        ({"weight_scale": torch.ones(2, 64).half()}, "weight_scale has shape [2, 64], expected [64, 2]"),
        ({"weight_zero_point": torch.zeros(64, 2).int()}, "weight_zero_point has shape [64, 2], expected [8, 2]"),
        ({"weight_g_idx": torch.zeros(3).int()}, "weight_g_idx has shape [3], expected [64]"),
    ],
)
def test_a_damaged_module_is_refused_by_tensor(tmp_path: Path, changes: dict, message: str) -> None:
    write_container(tmp_path, "compressed-tensors", KINDS["asymmetric"])
    edit(tmp_path, **{f"{Q0}.{part}": tensor for part, tensor in changes.items()})
    assert f"{Q0}.{message}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (KINDS["symmetric"], {"weight_shape": torch.tensor([64, 72])}, r"weight_shape holds \[64, 72\], expected"),
        (
            KINDS["symmetric"],
            {"weight_scale": torch.full((64, 2), torch.nan)},
            "weight_scale: 128 of 128 values",
        ),
        (KINDS["group order"], {"weight_g_idx": torch.full((64,), 9).int()}, "64 entries name no group"),
        (
            KINDS["asymmetric, zero points as bytes"],
            {"weight_zero_point": torch.full((64, 2), 8, dtype=torch.int8)},
            r"weight_zero_point: 128 values are beyond 4 bits \(at \[0, 0\]: 8; -8 to 7",
        ),
    ],
)
def test_wrong_values_are_refused_when_they_are_read(tmp_path: Path, kind: Kind, changes: dict, message: str) -> None:
    write_container(tmp_path, "compressed-tensors", kind)
    edit(tmp_path, **{f"{Q0}.{part}": tensor for part, tensor in changes.items()})
    with pytest.raises(CheckpointError, match=message):
        first_layer(tmp_path)


@pytest.mark.parametrize("container", ["awq", "compressed-tensors"])
def test_a_module_that_should_be_dense_is_read_by_its_shapes(tmp_path: Path, container: str) -> None:
    kind = Kind(sym=False)
    exact = write_container(tmp_path, container, kind)
    spared = {"modules_to_not_convert": ["q_proj"], "dynamic": {"-:.*q_proj": {}}}
    declaration = compressed_config(kind) | {"ignore": ["re:.*q_proj"]}
    if container == "awq":
        declaration = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", **spared}
    write_container(tmp_path, container, kind, declaration=declaration)
    state = read_state_dict(tmp_path)
    assert all(torch.equal(state[name], tensor) for name, tensor in exact.items())
