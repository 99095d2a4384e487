"""GPTQ linears in both compute modes, on every instruction set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from gptq_writer import pack_rows
from kernel_support import ISAS, every_isa, gptq_case, same_bits, spread_rows
from ropewalk import native
from ropewalk.backends.cpu import CpuBackend

# in_features, out_features, group sizes, options
CASES = {
    "one-tile": (32, 16, 32, {}),
    "one-element": (1, 1, 1, {"bits": 8}),
    "odd-sizes": (77, 35, 32, {"bias": True}),
    "one-group": (200, 33, [200], {"bits": 4, "scale_dtype": np.float32}),
    "empty-groups": (96, 48, [0, 40, 0, 0, 55, 1, 0], {"bits": 8, "bias": True}),
    "as-many-blocks-as-groups": (64, 24, [0, 64], {"bits": 4}),
    "irregular-act-order": (130, 21, [7, 32, 64, 27], {"bits": 4, "act_order": True}),
    "symmetric-g128": (256, 64, 128, {"constant_zero": 8}),
    "act-order-g32": (256, 40, 32, {"act_order": True, "bias": True}),
    "2-bit": (64, 20, 16, {"bits": 2}),
    "3-bit": (96, 17, 32, {"bits": 3, "constant_zero": 4}),
    "2-bit-act-order": (128, 40, 32, {"bits": 2, "act_order": True}),
    "planar-3-bit": (130, 35, [60, 38, 32], {"bits": 3, "planar": True, "act_order": True, "bias": True}),
    "5-bit": (96, 33, 32, {"bits": 5, "planar": True}),
    "planar-6-bit": (64, 31, 32, {"bits": 6, "planar": True, "act_order": True}),
    "8-bit-symmetric": (160, 50, 64, {"bits": 8, "constant_zero": 128}),
}
every_case = pytest.mark.parametrize("name", CASES)
needs_avxvnni = pytest.mark.skipif(
    "avxvnni" not in ISAS, reason="this processor has no AVX-VNNI (see scripts/press/check_avxvnni.sh)"
)


def make(name: str):
    in_features, out_features, group_sizes, options = CASES[name]
    return gptq_case(in_features, out_features, group_sizes, **options)


def activations(case, num_rows: int, seed: int = 1) -> np.ndarray:
    """[T, K] with magnitudes that differ between rows and between input features."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, case.codes.shape[0])) * rng.uniform(0.1, 10, (num_rows, 1))
    return (x * np.exp(rng.standard_normal(case.codes.shape[0]))).astype(np.float32)


def int8_values(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One digit: integers, and their scale for each row."""
    largest = np.abs(block).max(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(largest > 1e-36, np.rint(block * (np.float32(127) / largest)), 0)
    return values.astype(np.int64), largest / np.float32(127)


def exact_values(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Three digits: integers below 2^23, and their scale for each row, a power of two."""
    margin = np.abs(block).max(1, keepdims=True) * np.float32(1.005)
    scale = np.exp2(np.maximum(np.floor(np.log2(margin)) - 22, -126)).astype(np.float32)
    return np.rint(block / scale).astype(np.int64), scale


def formula(case, x: np.ndarray, values_of, dtype: type) -> np.ndarray:
    """The documented arithmetic: float32 up to the rounding to integers, exact integer sums, the rest in `dtype`."""
    y = np.tile(case.bias.astype(dtype), (x.shape[0], 1))
    for group, rows in case.blocks():
        values, scale = values_of(x[:, rows])
        scale = scale.astype(dtype)
        dot = (values @ case.codes[rows]).astype(dtype)
        centred = scale * dot - case.zeros[group].astype(dtype) * (scale * values.sum(1, keepdims=True).astype(dtype))
        y += case.scales[group].astype(dtype) * centred
    return y


@every_isa
@every_case
def test_exact_mode_is_as_accurate_as_float32(isa, name):
    case = make(name)
    x = activations(case, 96)
    runtime = native.Runtime(isa, 2)
    y = native.Linear(runtime, [case.pack(runtime)])(x, "exact")
    weight, bias = case.weight(), case.bias
    plain = torch.from_numpy(x) @ torch.from_numpy(weight.astype(np.float32)) + torch.from_numpy(bias).float()
    assert_as_accurate(y, x.astype(np.float64) @ weight + bias, plain)


@every_isa
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_activations_of_23_bits_are_multiplied_exactly(isa, bits):
    """Their scale is 1, and the sum of a block is rounded once."""
    case = gptq_case(32, 48, 32, bits=bits, constant_zero=1, scale_dtype=np.float32)
    case.arguments["scales"][:] = 1
    most = int(2**23 / 1.005)
    x = np.random.default_rng(6).integers(-most, most + 1, (9, 32))
    x[:, 7] = most
    x[0], x[1] = most, -most
    x[2, ::2], x[3, :] = -most, np.arange(32) * 32896 - 128  # every digit at its ends
    x[3, 7] = most
    runtime = native.Runtime(isa, 1)
    y = native.Linear(runtime, [case.pack(runtime)])(x.astype(np.float32), "exact")
    assert np.array_equal(y, (x @ (case.codes - 1)).astype(np.float32))


@every_isa
@every_case
@pytest.mark.parametrize("num_rows", [1, 3, 21])
@pytest.mark.parametrize("compute, values_of", [("exact", exact_values), ("int8", int8_values)])
def test_both_modes_follow_the_documented_formula(isa, name, num_rows, compute, values_of):
    case = make(name)
    x = activations(case, num_rows)
    runtime = native.Runtime(isa, 2)
    y = native.Linear(runtime, [case.pack(runtime)])(x, compute)
    assert_as_accurate(y, formula(case, x, values_of, np.float64), formula(case, x, values_of, np.float32))


@every_isa
@pytest.mark.parametrize("bits, top", [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_integer_sums_are_exact_at_their_extremes(isa, bits, top):
    """With a largest magnitude of 127 the scale of a block is 1, and the whole result is a small integer."""
    case = gptq_case(64, 32, 32, bits=bits, constant_zero=0, scale_dtype=np.float32)
    case.arguments["scales"][:] = 1
    case.arguments["qweight"][:, :16] = -1  # every code at its top
    codes = case.codes.copy()
    codes[:, :16] = top
    rng = np.random.default_rng(5)
    x = rng.integers(-127, 128, (6, 64)).astype(np.float32)
    x[:, [0, 32]] = 127
    x[0] = 127
    x[1] = -127
    x[2, 1::2] = -127
    runtime = native.Runtime(isa, 1)
    y = native.Linear(runtime, [case.pack(runtime)])(x, "int8")
    assert np.array_equal(y, x.astype(np.int64) @ codes)


@every_isa
@pytest.mark.parametrize("bits, top", [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_codes_and_zero_points_of_any_size_are_subtracted_exactly(isa, bits, top):
    """Rows of the identity read the weights one by one."""
    case = gptq_case(64, 96, 32, bits=bits, scale_dtype=np.float32)
    case.arguments["scales"][:] = 1
    weights = case.codes.astype(np.float32) - np.repeat(case.zeros, 32, axis=0)
    assert weights.min() < -top // 2 and weights.max() > top // 2
    runtime = native.Runtime(isa, 1)
    linear = native.Linear(runtime, [case.pack(runtime)])
    x = np.eye(64, dtype=np.float32)
    assert np.array_equal(linear(x, "exact"), weights + case.bias)
    assert all(np.array_equal(linear(x[k : k + 1], "exact"), weights[k : k + 1] + case.bias) for k in range(64))


@every_isa
def test_activations_halfway_between_integers_round_to_even(isa):
    case = gptq_case(32, 16, 32, constant_zero=0, scale_dtype=np.float32)
    case.arguments["scales"][:] = 1
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -3.5]
    runtime = native.Runtime(isa, 1)
    y = native.Linear(runtime, [case.pack(runtime)])(x, "int8")
    assert np.array_equal(y[0], np.array([127, 0, 2, 2, 0, -4]) @ case.codes[:6])


@every_isa
@pytest.mark.parametrize("name", [name for name in CASES if name != "one-element"])  # a block of one value is exact
def test_int8_mode_loses_no_more_than_rounding_each_block_of_activations_to_8_bits(isa, name):
    case = make(name)
    x = activations(case, 16)
    runtime = native.Runtime(isa, 2)
    y = native.Linear(runtime, [case.pack(runtime)])(x, "int8")
    rounded, weight = x.astype(np.float64), case.weight()
    for _, rows in case.blocks():
        step = np.abs(rounded[:, rows]).max(1, keepdims=True) / 127
        rounded[:, rows] = np.rint(rounded[:, rows] / step) * step
    assert_as_accurate(y, x.astype(np.float64) @ weight + case.bias, rounded @ weight + case.bias)


@every_isa
def test_blocks_too_small_to_scale_read_as_zero_and_huge_ones_are_right_or_overflow(isa):
    case = gptq_case(32, 16, 32, constant_zero=8)
    runtime = native.Runtime(isa, 1)
    linear = native.Linear(runtime, [case.pack(runtime)])
    assert np.array_equal(linear(np.full((1, 32), 1e-37, np.float32), "int8"), np.zeros((1, 16), np.float32))
    assert np.array_equal(linear(np.zeros((1, 32), np.float32), "int8"), np.zeros((1, 16), np.float32))
    for magnitude in (2e-36, 1e37, 3.2e38):
        x = np.zeros((1, 32), np.float32)
        x[0, 3] = magnitude
        y = linear(x, "int8")
        if magnitude > 1e38:  # some of the products overflow, and the others are right
            y, weight = y[:, np.isfinite(y[0])], case.weight()[:, np.isfinite(y[0])]
        else:
            weight = case.weight()
        assert_as_accurate(y, x.astype(np.float64) @ weight, x @ weight.astype(np.float32))


@every_isa
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e37])
def test_exact_mode_keeps_its_digits_at_any_magnitude(isa, magnitude):
    case = gptq_case(64, 16, 32)
    x = (activations(case, 32) * np.float32(magnitude / 1000)).astype(np.float32)
    runtime = native.Runtime(isa, 1)
    linear = native.Linear(runtime, [case.pack(runtime)])
    weight = case.weight()
    assert_as_accurate(
        linear(x, "exact"), x.astype(np.float64) @ weight, torch.from_numpy(x) @ torch.from_numpy(weight).float()
    )
    assert np.array_equal(linear(np.zeros((1, 64), np.float32), "exact"), np.zeros((1, 16), np.float32))


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_results_are_the_same_bits_for_any_rows_and_threads(isa, compute):
    case = gptq_case(130, 70, [60, 38, 32], act_order=True, bias=True)
    x = activations(case, 203)  # more than two panels of 96 rows
    whole = None
    for threads in range(1, 5):
        runtime = native.Runtime(isa, threads)
        linear = native.Linear(runtime, [case.pack(runtime)])
        y = linear(x, compute)
        assert whole is None or same_bits(y, whole)
        whole = y
        for chunk in (1, 7, 64) if threads == 3 else (100,):
            parts = [linear(x[t : t + chunk], compute) for t in range(0, len(x), chunk)]
            assert same_bits(np.concatenate(parts), whole)
        subset = np.random.default_rng(0).permutation(203)[:29]
        assert same_bits(linear(x[subset], compute), whole[subset])


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("name", ["2-bit", "3-bit", "2-bit-act-order", "planar-3-bit"])
def test_codes_of_2_and_3_bits_give_the_bits_that_they_give_in_4(isa, compute, name):
    case = make(name)
    in_features = case.codes.shape[0]
    rows = np.pad(case.codes, ((0, -in_features % 32), (0, 0)))
    in_4 = pack_rows(rows, 4, False)[: -(-in_features // 8)]
    runtime = native.Runtime(isa, 2)
    wide = native.pack_gptq(runtime, **case.arguments | {"qweight": in_4, "bits": 4, "planar": False})
    narrow = case.pack(runtime)
    assert narrow.num_bytes < wide.num_bytes
    for num_rows in (1, 2, 29):
        x = activations(case, num_rows)
        assert same_bits(native.Linear(runtime, [narrow])(x, compute), native.Linear(runtime, [wide])(x, compute))


@needs_avxvnni
@pytest.mark.parametrize("compute", ["exact", "int8"])
@every_case
def test_avxvnni_gives_the_bits_of_avx2(name, compute):
    """Sums of integers are exact, and all else is the same code."""
    case = make(name)
    x = activations(case, 9)
    first, second = (native.Runtime(isa, 1) for isa in ("avxvnni", "avx2"))
    for rows in (x, x[:1]):
        results = [native.Linear(runtime, [case.pack(runtime)])(rows, compute) for runtime in (first, second)]
        assert same_bits(*results)


@needs_avxvnni
@pytest.mark.parametrize("dtype", ["f16", "q8", "q6", "q4"])
def test_attention_of_avxvnni_gives_the_bits_of_avx2(dtype):
    keys, values = (np.random.default_rng(seed).standard_normal((150, 2, 48)).astype(np.float32) for seed in (0, 1))
    q = np.random.default_rng(2).standard_normal((3, 4, 48)).astype(np.float32)
    results = []
    for isa in ("avxvnni", "avx2"):
        cache = native.KvCache(native.Runtime(isa, 1), 2, 48, 150, dtype)
        cache.append_(keys, values, 0)
        results.append(cache.attend(q, 147, compute="int8"))
    assert same_bits(*results)


@needs_avxvnni
def test_backends_of_avxvnni_and_avx2_share_saved_caches():
    assert CpuBackend("int8", "avxvnni", 1).arithmetic == CpuBackend("int8", "avx2", 1).arithmetic


@pytest.mark.parametrize("pair", list(itertools.combinations(ISAS, 2)), ids="-".join)
def test_weights_packed_on_one_instruction_set_serve_another(pair):
    case = gptq_case(64, 40, 32, act_order=True)
    x = activations(case, 2)
    first, second = (native.Runtime(isa, 1) for isa in pair)
    assert same_bits(native.Linear(second, [case.pack(first)])(x), native.Linear(second, [case.pack(second)])(x))


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_parts_over_one_input_give_their_columns_side_by_side(isa, compute):
    runtime = native.Runtime(isa, 2)
    shared, same_order = (gptq_case(96, n, 32, act_order=True, seed=3) for n in (33, 33))
    sequential, padded = gptq_case(96, 16, 32), gptq_case(96, 5, [50, 46], bits=8, bias=True)
    narrow = [gptq_case(96, 21, 32, act_order=order, bits=bits) for bits, order in ((2, True), (3, False))]
    cases = [shared, sequential, same_order, padded, *narrow]
    dense = native.dense_linear(np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32))
    parts = [case.pack(runtime) for case in cases] + [dense]
    x = activations(shared, 11)
    together = native.Linear(runtime, parts)
    assert (together.in_features, together.out_features) == (96, 33 + 16 + 33 + 5 + 2 * 21 + 7)
    assert together.num_bytes == sum(part.num_bytes for part in parts)
    apart = [native.Linear(runtime, [part])(x, compute) for part in parts]
    assert same_bits(together(x, compute), np.concatenate(apart, axis=1))


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_rows_may_lie_any_distance_apart(isa, compute):
    for act_order in (False, True):
        case = gptq_case(64, 20, 32, act_order=act_order)
        x = activations(case, 5)
        runtime = native.Runtime(isa, 1)
        linear = native.Linear(runtime, [case.pack(runtime)])
        assert same_bits(linear(spread_rows(x), compute), linear(x, compute))


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_no_rows_give_no_rows(isa, compute):
    case = gptq_case(64, 20, 32)
    runtime = native.Runtime(isa, 2)
    linear = native.Linear(runtime, [case.pack(runtime)])
    assert linear(np.empty((0, 64), np.float32), compute).shape == (0, 20)
    y = linear(torch.empty(0, 64), compute)
    assert isinstance(y, torch.Tensor) and y.shape == (0, 20)


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"bits": 8}], ids=str)
def test_a_non_finite_activation_leaves_no_finite_number_in_its_row(isa, compute, value, options):
    case = gptq_case(64, 20, 32, **options)
    runtime = native.Runtime(isa, 1)
    linear = native.Linear(runtime, [case.pack(runtime)])
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    clean = linear(x, compute)
    x[np.arange(0, 64, 2), np.arange(0, 64, 2)] = value  # every second row, at every second place
    x[np.arange(0, 64, 2), (np.arange(0, 64, 2) + 17) % 64] = 5.0
    y = linear(x, compute)
    assert not np.isfinite(y[::2]).any()
    assert same_bits(y[1::2], clean[1::2])


def test_scales_that_are_not_finite_show_in_their_columns_alone():
    case = gptq_case(64, 20, 32)
    case.arguments["scales"][1, 3] = np.nan
    runtime = native.Runtime()
    for compute in ("exact", "int8"):
        y = native.Linear(runtime, [case.pack(runtime)])(np.ones((2, 64), np.float32), compute)
        assert np.isnan(y[:, 3]).all() and np.isfinite(np.delete(y, 3, axis=1)).all()
