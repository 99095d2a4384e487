"""Rounding of floats to codes: the compiled core and torch agree to the bit (gptq/rounding.py has the rule)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_support import every_isa
from ropewalk import native
from ropewalk.base.errors import ShapeError
from ropewalk.gptq.rounding import RUN_INPUTS, round_rows
from ropewalk.native.core import _core


def weight(num_rows: int, num_inputs: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    spread = 2.0 ** torch.randint(-3, 4, (num_rows, 1), generator=generator)
    return (torch.randn(num_rows, num_inputs, generator=generator) * spread * 0.02).to(dtype)


def assert_alike(runtime: native.Runtime, rows: torch.Tensor, bits: int) -> None:
    for ours, theirs in zip(native.round_rows(runtime, rows, bits), round_rows(rows, bits), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 8), (37, 160), (16, 64), (130, 200)])
def test_the_core_rounds_as_torch_does(isa, bits, dtype, shape):
    """Rows that fill no tile, and last runs that are short."""
    assert_alike(native.Runtime(isa, 3), weight(*shape, dtype), bits)


@every_isa
@pytest.mark.parametrize("bits", [8, 4])
def test_halves_go_to_the_even_code_and_zeros_stay(isa, bits):
    rows = torch.zeros(4, 128)
    rows[0] = torch.arange(-64, 64) / 2 + (127 / 2 if bits == 4 else 0)
    rows[1, :2] = torch.tensor([127.0, 0.5])  # a scale of 1: 0.5 lies between two codes
    rows[2] = -1.0
    assert_alike(native.Runtime(isa, 1), rows, bits)


@every_isa
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("factor", [1e-6, 1e9, 1e-42])
def test_scales_that_are_no_normal_float16_stay_float32(isa, bits, factor):
    rows = weight(20, 96, torch.float32)
    rows[7] *= factor
    assert_alike(native.Runtime(isa, 2), rows, bits)
    assert native.round_rows(native.Runtime(isa, 2), rows, bits)[1].dtype == torch.float32


@every_isa
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_run_with_what_is_no_number_has_no_finite_scale(isa, bits, value):
    rows = weight(3, 128, torch.float32)
    rows[1, 70] = value
    scales = native.round_rows(native.Runtime(isa, 1), rows, bits)[1].isfinite()
    spoilt = torch.zeros_like(scales)
    spoilt[70 // RUN_INPUTS[bits], 1] = True
    assert torch.equal(~scales, spoilt)


@pytest.mark.parametrize(
    "rows, bits, message",
    [
        (torch.ones(4, 36), 4, "weight has rows of 36; expected a multiple of 8"),
        (torch.ones(4, 3), 8, "weight has rows of 3; expected a multiple of 4"),
        (torch.ones(4, 8), 5, "bits is 5; accepted: 8, 4"),
        (torch.ones(4, 8, dtype=torch.float64), 8, "weight has dtype float64; accepted: float32, float16, bfloat16"),
        (torch.ones(8), 8, "weight has shape"),
        (torch.ones(8, 4).T, 8, "must be contiguous"),
    ],
)
def test_other_matrices_are_refused(rows, bits, message):
    with pytest.raises(ShapeError, match=message):
        native.round_rows(native.Runtime(threads=1), rows, bits)


def test_the_core_checks_what_it_writes_to():
    runtime = native.Runtime(threads=1)
    good = {
        "weight": np.ones((16, 64), np.float32),
        "words": np.zeros((16, 16), np.int32),
        "scales": np.zeros((1, 16), np.float32),
        "zeros": np.zeros((1, 16), np.uint8),
    }

    def call(**changed: object) -> bool:
        arrays = good | changed
        outputs = arrays["words"], arrays["scales"], arrays["zeros"]
        return _core.round_rows(runtime.core, arrays["weight"], "f32", changed.get("bits", 8), True, *outputs)

    assert call() is False
    shared = np.zeros((16, 64), np.float32)
    words = shared.view(np.int32).reshape(-1)[:256].reshape(16, 16)  # the same memory
    for changed, message in [
        ({"bits": 3}, "bits must be 8 or 4"),
        ({"words": np.zeros((15, 16), np.int32)}, "words has shape"),
        ({"words": np.zeros((16, 32), np.int32)[:, :16]}, "words must be contiguous"),
        ({"scales": np.zeros((2, 16), np.float32)}, "scales has shape"),
        ({"zeros": np.zeros((1, 16), np.int8)}, "zeros has dtype"),
        ({"weight": shared, "words": words}, "words overlaps weight"),
        ({"words": words, "scales": shared[:1, :16]}, "scales overlaps words"),
    ]:
        with pytest.raises(ShapeError, match=message):
            call(**changed)
