"""The room gptq/: every layout, era and quirk against the float weights that the writer computed, bit for bit."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import gptq_writer
from gptq_writer import Kind, pack_columns, pack_rows, quantised_linear
from ropewalk.base.errors import CheckpointError
from ropewalk.config.quantisation import QuantSettings
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.bits import unpack_columns, unpack_rows
from ropewalk.gptq.linear import GptqLinear, read_gptq_linear
from ropewalk.gptq.zeros import read_packed_zeros

K, N = 96, 64


def settings_for(kind: Kind, **changes: object) -> QuantSettings:
    declared = QuantSettings(
        kind.bits, kind.group_size, kind.desc_act, kind.sym, kind.format, kind.word_borrow and kind.format == "gptq"
    )
    return replace(declared, **changes)


def write_module(folder: Path, kind: Kind, seed: int = 0, **replaced: torch.Tensor | None) -> torch.Tensor:
    """One linear `m` [K -> N] in folder/model.safetensors; returns its exact weight [K, N]. None drops a tensor."""
    tensors, weight = quantised_linear("m", K, N, kind, np.random.default_rng(seed))
    tensors |= {f"m.{part}": tensor for part, tensor in replaced.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    return weight.T


def read(folder: Path, declared: QuantSettings | None) -> GptqLinear:
    with Checkpoint(folder) as checkpoint:
        return read_gptq_linear(checkpoint, "m", K, N, declared)


def warn_never(kind: str, message: str) -> None:
    raise AssertionError(message)


# Bits


# Codes v[i] = (5 i + 3) mod 2^bits for i = 0..31; the words are those of docs/formats.md, "Bit order".
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "93939393 93939393"),
        (3, "43c67543 7543c675 c67543c6"),
        (4, "61c72d83 e94fa50b 61c72d83 e94fa50b"),
        (8, "120d0803 26211c17 3a35302b 4e49443f 625d5853 76716c67 8a85807b 9e99948f"),
    ],
)
def test_the_bit_order_is_that_of_the_format(bits, words):
    packed = np.array([int(word, 16) for word in words.split()], dtype=np.uint32).view(np.int32)
    expected = (5 * torch.arange(32) + 3) % 2**bits
    assert torch.equal(unpack_rows(torch.from_numpy(packed)[:, None], bits, planar=False)[:, 0].long(), expected)
    assert torch.equal(unpack_columns(torch.from_numpy(packed)[None], bits, planar=False)[0].long(), expected)


def test_planes_lie_low_plane_first():
    """6 bits: words 0-3 hold the low four bits of eight codes each, words 4-5 the high two bits of sixteen each."""
    words = torch.zeros(6, 1, dtype=torch.int32)
    words[1] = 0xA << 4  # code 9, low bits 1010
    words[4] = 0b11 << 18  # code 9, high bits 11
    codes = unpack_rows(words, 6, planar=True)[:, 0]
    assert codes[9] == 0b111010
    assert codes.count_nonzero() == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_unpacking_inverts_packing(data):
    bits, planar = data.draw(st.sampled_from([(b, False) for b in (2, 3, 4, 8)] + [(b, True) for b in (3, 5, 6, 7)]))
    rows, columns = 32 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    codes = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 2**bits, (rows, columns))
    expected = torch.from_numpy(codes).to(torch.uint8)
    assert torch.equal(unpack_rows(torch.from_numpy(pack_rows(codes, bits, planar)), bits, planar), expected)
    assert torch.equal(unpack_columns(torch.from_numpy(pack_columns(codes.T, bits, planar)), bits, planar), expected.T)


# Whole modules

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


# Zero points


def v1(bits: int, word_borrow: bool = False) -> QuantSettings:
    return QuantSettings(bits, 32, False, False, "gptq", word_borrow)


def test_word_borrow_is_undone_by_adding_to_the_whole_word():
    words = torch.tensor([[0x7777776F]], dtype=torch.int32)
    assert read_packed_zeros(words, v1(4, word_borrow=True), "z", warn_never).tolist() == [[0, 8, 8, 8, 8, 8, 8, 8]]
    per_field = read_packed_zeros(words, v1(4), "z", warn_never)
    assert per_field.tolist() == [[0, 7, 8, 8, 8, 8, 8, 8]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_stored_zero_point_wraps_to_zero(bits):
    top = 2**bits - 1
    fields = np.array([[top, 0] * 16])
    zeros = read_packed_zeros(torch.from_numpy(pack_columns(fields, bits)), v1(bits), "z", warn_never)
    assert zeros.tolist() == [[0, 1] * 16]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("word_borrow", [False, True])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_the_symmetric_pattern_of_the_other_version_is_believed_with_a_warning(
    tmp_path, bits, word_borrow, label, caplog
):
    stored = Kind(bits=bits, format="gptq" if label == "gptq_v2" else "gptq_v2")
    expected = write_module(tmp_path, stored)
    with caplog.at_level(logging.WARNING):
        linear = read(tmp_path, settings_for(stored, format=label, word_borrow=word_borrow))
    assert torch.equal(linear.dequantise(), expected)
    assert len(caplog.messages) == 1
    assert f"says {label}" in caplog.text and "m.qzeros" in caplog.text


def test_zero_points_lost_by_autogptq_are_warned_about(tmp_path, caplog):
    write_module(tmp_path, Kind(), qzeros=torch.tensor([[-1] + [0x77777777] * 7] * 3, dtype=torch.int32))
    with caplog.at_level(logging.WARNING):
        linear = read(tmp_path, settings_for(Kind()))
    assert linear.zeros[0].tolist() == [0] * 8 + [8] * 56
    assert "m.qzeros holds words of all ones" in caplog.text


# Eras (docs/formats.md, "Files of 2023")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_era_0_zeros_are_divided_back(tmp_path, bits, sym):
    kind = Kind(bits=bits, group_size=-1, sym=sym, era=0, zero_point_zero=True)
    expected = write_module(tmp_path, kind)
    for declared in (settings_for(kind), None):
        assert torch.equal(read(tmp_path, declared).dequantise(), expected)


def test_era_0_accepts_the_rounding_of_half_precision(tmp_path):
    kind = Kind(bits=8, group_size=-1, sym=False, era=0)
    write_module(tmp_path, kind)
    with Checkpoint(tmp_path) as checkpoint:
        halves = {part: checkpoint.tensor(f"m.{part}").half() for part in ("scales", "zeros")}
        expected = read_gptq_linear(checkpoint, "m", K, N, None).zeros
    write_module(tmp_path, kind, **halves)
    assert torch.equal(read(tmp_path, None).zeros, expected)


def test_era_0_zeros_that_are_no_multiple_of_the_scale_are_refused(tmp_path):
    kind = Kind(bits=4, group_size=-1, era=0)
    for wrong in (0.5, 16.0, -1.0, float("nan")):
        write_module(
            tmp_path, kind, zeros=torch.full((N, 1), 8.0).index_fill(0, torch.tensor(5), wrong), scales=torch.ones(N, 1)
        )
        with pytest.raises(CheckpointError, match=r"m\.zeros: 1 values .*column 5"):
            read(tmp_path, settings_for(kind))


def test_era_1_has_float_scales_and_no_g_idx(tmp_path):
    kind = Kind(bits=4, group_size=32, era=1, sym=False)
    expected = write_module(tmp_path, kind, bias=torch.zeros(N))
    linear = read(tmp_path, settings_for(kind))
    assert torch.equal(linear.dequantise(), expected)
    assert linear.scales.dtype == torch.float32
    assert linear.bias is None


# g_idx


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


# Values and shapes


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


# Settings from shapes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 24])
def test_bits_and_groups_are_inferred_from_the_shapes(tmp_path, bits, group_size):
    kind = Kind(bits=bits, group_size=group_size, g_idx="absent", sym=bits < 5)
    expected = write_module(tmp_path, kind)
    assert torch.equal(read(tmp_path, None).dequantise(), expected)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"qweight": torch.zeros(13, N, dtype=torch.int32)}, r"13, 64.*4\.33333 bits per weight"),
        ({"qweight": torch.zeros(27, N, dtype=torch.int32)}, "9 bits per weight"),
        ({"qweight": torch.tensor(1, dtype=torch.int32)}, "0 bits per weight"),
        ({"scales": torch.ones(97, N)}, "97 groups for 96 inputs"),
        ({"scales": torch.ones(0, N)}, "0 groups for 96 inputs"),
        ({"scales": torch.ones(7, N)}, r"fits several group sizes or none.*quantize_config\.json"),
    ],
)
def test_shapes_that_allow_no_inference_say_so(tmp_path, replaced, message):
    write_module(tmp_path, Kind(), **replaced)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, None)


def test_the_writer_packs_planes_as_documented():
    """The planar writer and reader share no code; this pins the writer to the words of docs/formats.md."""
    codes = np.zeros((32, 1), np.int64)
    codes[16] = 0b1100101
    words = gptq_writer.pack_rows(codes, 7, planar=True)[:, 0].tolist()
    assert words == [0, 0, 0b0101, 0, 0, 0b10, 1 << 16]
