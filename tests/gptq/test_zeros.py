"""Zero points of both versions and of the old eras."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from gptq_modules import K, N, read, settings_for, v1, warn_never, write_module
from gptq_writer import Kind, pack_columns
from ropewalk.base.errors import CheckpointError
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import read_gptq_linear
from ropewalk.gptq.zeros import read_packed_zeros


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
