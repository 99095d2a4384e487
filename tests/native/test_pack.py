"""Repacking of checkpoint words into tiles: every code arrives, whatever its width and order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_support import every_isa, gptq_case
from ropewalk import native
from ropewalk.gptq.linear import GptqLinear


def codes_read_back(case, isa: str) -> np.ndarray:
    """The packed codes as integers: the identity through weights of scale 1 and zero point 0."""
    arguments = case.arguments | {
        "scales": np.ones_like(case.arguments["scales"]),
        "zeros": np.zeros_like(case.arguments["zeros"]),
    }
    runtime = native.Runtime(isa, 2)
    linear = native.Linear(runtime, [native.pack_gptq(runtime, **arguments)])
    return linear(np.eye(case.codes.shape[0], dtype=np.float32), "exact")


@every_isa
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("out_features", [37, 64, 150])
def test_every_code_comes_back_exactly(isa, bits, planar, out_features):
    """Columns are repacked 64 at a time: less than that, as many, and some left over."""
    case = gptq_case(96, out_features, 32, bits=bits, planar=planar)
    assert np.array_equal(codes_read_back(case, isa), case.codes)


@every_isa
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "in_features, group_sizes",
    [(1, [1]), (33, [33]), (50, [20, 0, 1, 29]), (64, [0, 64, 0]), (70, 32), (128, 128), (40, [8] * 5)],
)
def test_codes_come_back_from_groups_of_any_size_in_any_order(isa, bits, in_features, group_sizes):
    case = gptq_case(in_features, 82, group_sizes, bits=bits, act_order=True)
    assert np.array_equal(codes_read_back(case, isa), case.codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_agree_with_dequantisation_by_shifts_of_torch_integers(bits):
    """A second opinion that shares nothing with our packer: the unpacking that peers do with torch operations."""
    case = gptq_case(64, 24, 32, bits=bits)
    words = torch.from_numpy(case.arguments["qweight"])  # [K * bits / 32, N]
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[None, :, None]
    codes = torch.bitwise_right_shift(words[:, None, :], shifts).bitwise_and((1 << bits) - 1).reshape(64, 24)
    groups = torch.arange(64) // 32
    scales, zeros = (torch.from_numpy(case.arguments[name]) for name in ("scales", "zeros"))
    weight = scales[groups].float() * (codes - zeros[groups].int()).float()  # [K, N]
    runtime = native.Runtime()
    y = native.Linear(runtime, [case.pack(runtime)])(torch.eye(64), "exact")
    assert torch.equal(y, weight)


@pytest.mark.parametrize("bits, planar", [(3, False), (3, True), (4, False), (5, True), (8, False)])
def test_weights_agree_with_the_checkpoint_reader_yardstick(bits, planar):
    case = gptq_case(96, 16, [40, 24, 32], bits=bits, planar=planar, act_order=True, scale_dtype=np.float32)
    a = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in case.arguments.items()}
    plain = GptqLinear(
        name="w",
        bits=bits,
        in_features=96,
        out_features=16,
        planar=planar,
        qweight=a["qweight"],
        scales=a["scales"],
        zeros=a["zeros"],
        group_starts=a["group_starts"],
        order=a["order"],
        bias=None,
    )
    runtime = native.Runtime()
    y = native.Linear(runtime, [native.pack_gptq(runtime, **a)])(torch.eye(96), "exact")
    assert torch.equal(y, plain.dequantise())


@pytest.mark.parametrize("bits, width", [(2, 2), (3, 3), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_size_in_bytes_is_that_of_tiles_scales_and_zero_points(bits, width):
    runtime = native.Runtime()
    codes, scales = 128 * 32 * width // 8, 4 * 32 * 2
    group_starts = 5 * 4
    varied = gptq_case(128, 32, 32, bits=bits, planar=True).pack(runtime)
    assert varied.num_bytes == codes + scales + 4 * 32 + group_starts
    symmetric = gptq_case(128, 32, 32, bits=bits, planar=True, constant_zero=2).pack(runtime)
    assert symmetric.num_bytes == codes + scales + group_starts
