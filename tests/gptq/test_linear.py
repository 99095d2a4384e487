"""Whole GPTQ modules: weights, orders, groups, biases, and what is refused by name."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptq_modules import K, N, read, settings_for, write_module
from gptq_writer import Kind
from ropewalk.base.errors import CheckpointError
from ropewalk.config.quantisation import QuantSettings
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import read_gptq_linear

CONTINUOUS = [
    Kind(bits=bits, group_size=group, desc_act=act, sym=sym, format=form, zero_point_zero=True)
    for bits, group, act, sym, form in itertools.product(
        (2, 3, 4, 8), (-1, 32, 40, 1024), (False, True), (False, True), ("gptq", "gptq_v2")
    )
]


PLANAR = [
    Kind(bits=bits, group_size=group, desc_act=act, sym=sym, format="gptq_p", zero_point_zero=True)
    for bits, group, act, sym in itertools.product((3, 5, 6, 7), (-1, 32), (False, True), (False, True))
]


@pytest.mark.parametrize("kind", CONTINUOUS + PLANAR, ids=str)
def test_dequantised_weights_are_exactly_those_of_the_writer(tmp_path, kind, caplog):
    expected = write_module(tmp_path, kind)
    linear = read(tmp_path, settings_for(kind))
    assert torch.equal(linear.dequantise(), expected)
    assert (linear.bits, linear.in_features, linear.out_features) == (kind.bits, K, N)
    assert linear.planar == kind.planar
    assert not caplog.messages


@pytest.mark.parametrize("kind", [Kind(desc_act=True, sym=False), Kind(desc_act=False, group_size=40)], ids=str)
def test_order_and_group_starts_describe_the_sorted_rows(tmp_path, kind):
    write_module(tmp_path, kind)
    linear = read(tmp_path, settings_for(kind))
    stored = Checkpoint(tmp_path).tensor("m.g_idx").long()
    assert torch.equal(linear.group_index(), stored)
    assert linear.group_starts.tolist() == [0, *torch.bincount(stored).cumsum(0).tolist()]
    if kind.desc_act:
        assert linear.order.dtype == torch.int32
        sizes = linear.group_starts.diff()
        assert torch.equal(stored[linear.order.long()], torch.repeat_interleave(torch.arange(len(sizes)), sizes))
        inside = linear.order.diff() < 0  # the sort is stable: the order falls only where a group begins
        assert set((inside.nonzero()[:, 0] + 1).tolist()) <= set(linear.group_starts.tolist())
    else:
        assert linear.order is None


def test_the_packed_codes_are_handed_on_as_stored(tmp_path):
    write_module(tmp_path, Kind())
    with Checkpoint(tmp_path) as checkpoint:
        linear = read_gptq_linear(checkpoint, "m", K, N, settings_for(Kind()))
        assert torch.equal(linear.qweight, checkpoint.tensor("m.qweight"))
        assert linear.qweight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_every_float_type_are_exact(tmp_path, dtype):
    expected = write_module(tmp_path, Kind(scales_dtype=dtype, sym=False))
    linear = read(tmp_path, settings_for(Kind(sym=False)))
    assert torch.equal(linear.dequantise(), expected)
    assert linear.scales.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)


def test_irregular_and_empty_groups_are_read_from_g_idx(tmp_path):
    g_idx = torch.tensor([2] * 10 + [0] * 60 + [2] * 26, dtype=torch.int32)
    write_module(tmp_path, Kind(), g_idx=g_idx)
    linear = read(tmp_path, settings_for(Kind()))
    assert linear.group_starts.tolist() == [0, 60, 60, 96]
    weight = linear.scales.float()[g_idx.long()] * (linear.codes().float() - 8)
    assert torch.equal(linear.dequantise(), weight)


@pytest.mark.parametrize("g_idx", ["absent", "zeros", "unset", "int64"])
def test_a_g_idx_without_information_means_groups_in_order(tmp_path, g_idx):
    kind = Kind(group_size=40, g_idx=g_idx, sym=False)
    expected = write_module(tmp_path, kind)
    linear = read(tmp_path, settings_for(kind))
    assert torch.equal(linear.dequantise(), expected)
    assert linear.order is None
    assert linear.group_starts.tolist() == [0, 40, 80, 96]


def test_an_int64_g_idx_may_be_permuted(tmp_path):
    kind = Kind(desc_act=True, g_idx="int64")
    expected = write_module(tmp_path, kind)
    assert torch.equal(read(tmp_path, settings_for(kind)).dequantise(), expected)


def test_an_all_zero_g_idx_of_one_group_is_one_group(tmp_path):
    kind = Kind(group_size=-1, desc_act=True)
    expected = write_module(tmp_path, kind)
    linear = read(tmp_path, settings_for(kind))
    assert torch.equal(linear.dequantise(), expected)
    assert linear.group_starts.tolist() == [0, K]


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1, -(2**31)])
def test_groups_out_of_range_are_an_error_that_names_row_and_tensor(tmp_path, wrong):
    g_idx = (torch.arange(K) // 32).int()
    g_idx[7] = wrong
    write_module(tmp_path, Kind(), g_idx=g_idx)
    with pytest.raises(CheckpointError, match=rf"m\.g_idx: 1 of 96 entries .*row 7: {wrong}; 0 to 2 are accepted"):
        read(tmp_path, settings_for(Kind()))


def test_a_concatenated_g_idx_of_fused_modules_is_refused_by_name(tmp_path):
    write_module(tmp_path, Kind(), g_idx=torch.zeros(3 * K, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="3 concatenated g_idx of fused modules"):
        read(tmp_path, settings_for(Kind()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_and_biases_that_are_not_finite_are_refused(tmp_path, value, dtype):
    scales = torch.ones(3, N, dtype=dtype)
    scales[1, 5] = value
    write_module(tmp_path, Kind(), scales=scales)
    with pytest.raises(CheckpointError, match=r"m\.scales: 1 of 192 values .*\[1, 5\]"):
        read(tmp_path, settings_for(Kind()))
    write_module(tmp_path, Kind(), bias=scales[1].clone())
    with pytest.raises(CheckpointError, match=r"m\.bias: 1 of 64 values"):
        read(tmp_path, settings_for(Kind()))


def test_biases_are_float32_and_zero_ones_vanish(tmp_path):
    bias = torch.arange(N).half()
    write_module(tmp_path, Kind(), bias=bias)
    assert torch.equal(read(tmp_path, settings_for(Kind())).bias, bias.float())
    write_module(tmp_path, Kind(), bias=torch.zeros(N).half())
    assert read(tmp_path, settings_for(Kind())).bias is None


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"qweight": torch.zeros(24, N, dtype=torch.int32)},
            r"m\.qweight has shape \[24, 64\], expected \[12, 64\].*8-bit",
        ),
        ({"qweight": torch.zeros(13, N, dtype=torch.int32)}, r"m\.qweight has shape \[13, 64\], expected \[12, 64\]$"),
        ({"qweight": torch.zeros(12, N)}, r"m\.qweight has dtype F32, accepted I32"),
        ({"scales": torch.ones(6, N)}, r"m\.scales has shape \[6, 64\].*it has 6 groups.*group_size 32"),
        ({"scales": torch.ones(3, N, dtype=torch.int32)}, r"m\.scales has dtype I32, accepted F16/BF16/F32"),
        ({"scales": None}, r"m\.scales is missing"),
        ({"scales": torch.tensor(1.0)}, r"m\.scales has shape \[\]"),
        ({"qzeros": torch.zeros(3, 7, dtype=torch.int32)}, r"m\.qzeros has shape \[3, 7\], expected \[3, 8\]$"),
        ({"qzeros": None}, r"m\.qzeros is missing"),
        ({"g_idx": torch.zeros(K)}, r"m\.g_idx has dtype F32, accepted I32/I64"),
        ({"g_idx": torch.zeros(K + 1).int()}, r"m\.g_idx has shape \[97\], expected \[96\]$"),
        ({"bias": torch.zeros(1, N)}, r"m\.bias has shape \[1, 64\], expected \[64\]"),
    ],
)
def test_wrong_shapes_name_tensor_found_expected_and_cause(tmp_path, replaced, message):
    write_module(tmp_path, Kind(), **replaced)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, settings_for(Kind()))


def test_sizes_that_the_bits_cannot_hold_are_refused(tmp_path):
    write_module(tmp_path, Kind())
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="only multiples of 32"):
        read_gptq_linear(checkpoint, "m", 80, N, QuantSettings(3, 32, False, True, "gptq", False))
