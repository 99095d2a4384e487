"""Bits and group sizes inferred from the shapes."""

from __future__ import annotations

import pytest
import torch

from gptq_modules import N, read, write_module
from gptq_writer import Kind
from ropewalk.base.errors import CheckpointError


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
