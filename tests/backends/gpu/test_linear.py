"""Products with GPTQ weights: every width, grouping and order, the same bits for any rows, nothing read beside them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate, assert_error, error_of, size_of
from gpu_support import DEVICE, halves, normal, packed, plain_form, product, same_bits
from kernel_support import GptqCase, gptq_case
from ropewalk.backends.gpu import quantised, tiles
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, prepare
from ropewalk.backends.gpu.linear import GpuLinear
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.base.errors import ShapeError
from ropewalk.gptq.linear import DenseLinear
from triton_interpreter import (
    guarded,
    inside_arguments,
    interpreted_only,
    room_around,
    teach_assembly,
)

REFERENCE = ReferenceBackend("exact")
UNEVEN = [40, 1, 0, 55, 32]  # rows of groups; one has none

CASES = {
    "2 bits": gptq_case(160, 70, 32, bits=2),
    "2 bits, act-order": gptq_case(128, 64, 64, bits=2, act_order=True),
    "3 bits": gptq_case(288, 64, 32, bits=3, bias=True),
    "3 bits, planar": gptq_case(96, 40, 32, bits=3, planar=True),
    "3 bits, one group, act-order": gptq_case(96, 40, 96, bits=3, act_order=True),
    "4 bits": gptq_case(256, 128, 128, bias=True),
    "4 bits, float32 scales": gptq_case(96, 64, 32, scale_dtype=np.float32),
    "4 bits, act-order with uneven groups": gptq_case(128, 64, UNEVEN, act_order=True, bias=True),
    "4 bits, uneven groups in order": gptq_case(128, 64, UNEVEN),
    "4 bits, one group": gptq_case(320, 64, 320),
    "4 bits, groups of several blocks": gptq_case(512, 64, 256),
    "4 bits, a shorter last group": gptq_case(104, 33, 40),
    "4 bits, zero points of 0": gptq_case(64, 64, 32, constant_zero=0),
    "4 bits, zero points of 16": gptq_case(64, 64, 32, constant_zero=16),
    "8 bits": gptq_case(224, 130, 32, bits=8, bias=True),
    "8 bits, zero points of 255": gptq_case(96, 64, 48, bits=8, constant_zero=255, act_order=True),
    "5 bits": gptq_case(96, 64, 32, bits=5, planar=True),
    "6 bits": gptq_case(64, 64, 64, bits=6, planar=True, act_order=True),
    "7 bits": gptq_case(64, 64, 32, bits=7, planar=True),
}


def expected(case: GptqCase, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x W + bias in float64, and by torch in float32."""
    weight, bias = torch.from_numpy(case.weight()), torch.from_numpy(case.bias)
    return (x.double() @ weight + bias).numpy(), (x @ weight.float() + bias.float()).numpy()


@pytest.mark.parametrize("compute", ["fp16", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_exact_weights(name: str, compute: str) -> None:
    case = CASES[name]
    linear, x = plain_form(case), halves(3, case.codes.shape[0], seed=1)
    weight = packed(linear, compute=compute)
    found = product(x, weight)
    assert_as_accurate(found, *expected(case, x))
    assert_as_accurate(REFERENCE.linear(x, REFERENCE.pack([linear])), *expected(case, x))
    assert (weight.in_features, weight.out_features) == case.codes.shape


def test_activations_in_float16_lose_what_their_rounding_loses() -> None:
    case = CASES["4 bits"]
    x = normal(3, case.codes.shape[0])
    exact, plain = expected(case, x)
    assert_as_accurate(product(x, packed(plain_form(case), compute="exact")), exact, plain)
    rounded, _ = expected(case, x.half().float())
    found = product(x, packed(plain_form(case)))
    assert_error(error_of(found, exact), error_of(rounded, exact), size_of(exact), factor=1.01)


FORMS = [
    "4 bits",
    "4 bits, act-order with uneven groups",
    "4 bits, one group",
    "3 bits",
    "8 bits, zero points of 255",
]


@pytest.mark.parametrize("name, compute", [*((name, "fp16") for name in FORMS), ("4 bits", "exact")])
def test_a_row_has_the_same_bits_whatever_is_beside_it(
    name: str, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(plain_form(CASES[name]), compute=compute)
    assert weight.segments[0].product.splits > 1
    x = normal(40, weight.in_features, seed=2)
    whole = product(x, weight)
    for num_rows in (1, 2, 3, 7, 16, 17) if name == "4 bits" else (1, 7, 17):
        assert same_bits(product(x[40 - num_rows :], weight), whole[40 - num_rows :]), num_rows
    monkeypatch.setattr(tiles, "SPLIT_ROWS", 0)  # one program for all parts of K, as for many rows
    for num_rows in (1, 40):
        assert same_bits(product(x[:num_rows], weight), whole[:num_rows]), num_rows


def test_the_form_for_many_rows_is_taken_beyond_the_limit() -> None:
    weight = packed(plain_form(CASES["4 bits"]))
    x = normal(tiles.SPLIT_ROWS + 1, weight.in_features, seed=3)
    assert same_bits(product(x, weight)[-1:], product(x[-1:], weight))


def test_the_tiles_of_every_card_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(plain_form(CASES["4 bits"]))
    x = normal(65, weight.in_features, seed=2)
    whole = product(x, weight)
    used = set()
    for generation in (0, tiles.HOPPER):
        monkeypatch.setattr(tiles, "generation", lambda device, generation=generation: generation)
        for num_rows in (1, 9, 65):
            assert same_bits(product(x[:num_rows], weight), whole[:num_rows]), (generation, num_rows)
            used.add(tiles.linear_tile(num_rows, weight.out_features, 4, 128, False, generation).rows)
    assert used == {8, 16, 64, 128}


def test_activations_may_be_far_beyond_the_range_of_float16() -> None:
    case = CASES["4 bits, act-order with uneven groups"]
    weight = packed(plain_form(case))
    x = halves(6, case.codes.shape[0], seed=4)
    scales = torch.tensor([1.0, 2.0**20, 2.0**100, 2.0**-100, 0.0, 2.0**60])[:, None]
    sums = product(x * scales, weight) - torch.from_numpy(case.bias).float()
    expected_sums = expected(case, x)[0] - case.bias
    for row in (1, 2, 5):  # of these the bias is nothing
        found = sums[row].double() / scales[row]
        assert_error(error_of(found, expected_sums[row]), size_of(0.0), size_of(expected_sums[row]))
    assert torch.equal(sums[3:5], torch.zeros(2, weight.out_features))
    tiny = packed(dataclasses.replace(plain_form(case), bias=None))
    found = product(x * scales, tiny)[3].double() / scales[3]
    assert_error(error_of(found, expected_sums[3]), size_of(0.0), size_of(expected_sums[3]))


def test_a_single_large_feature_leaves_the_others_their_digits() -> None:
    """As the massive activations of Llama and Qwen models: one feature of a row is far beyond all others."""
    case = CASES["4 bits"]
    x = halves(2, case.codes.shape[0], seed=5)
    x[:, 7] = 2.0**18
    rounded = x.div(32).half().float().mul(32)  # the scale of these rows: 2^18 becomes 8192
    exact, plain = expected(case, rounded)
    assert_as_accurate(product(x, packed(plain_form(case))), exact, plain)
    lost = np.abs(exact - expected(case, x)[0]).max()
    x[:, 7] = 0.0
    assert lost < 1e-4 * np.abs(expected(case, x)[0]).max()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    weight = packed(plain_form(CASES["4 bits"]))
    x = normal(3, weight.in_features)
    clean = product(x, weight)
    x[1, 5] = value
    found = product(x, weight)
    assert same_bits(found[::2], clean[::2])
    assert not torch.isfinite(found[1]).any()


def test_linears_of_one_kind_are_multiplied_at_once_and_others_by_themselves() -> None:
    q, k = gptq_case(128, 48, 32, seed=1), gptq_case(128, 16, 32, bias=True, seed=2)
    v = gptq_case(128, 24, 32, bits=8, seed=3)
    ordered = [gptq_case(128, 40, 32, act_order=True, seed=seed) for seed in (4, 4, 5)]
    head = DenseLinear("head", normal(20, 128, seed=6), None)
    parts = [plain_form(case, f"part{number}") for number, case in enumerate((q, k, v, *ordered))]
    weight = packed(*parts, head)
    widths = [(segment.first, segment.end) for segment in weight.segments]
    assert widths == [(0, 64), (64, 88), (88, 168), (168, 208), (208, 228)]  # equal orders side by side are one
    assert [segment.order for segment in weight.segments] == [0, 0, 1, 2, 3]
    x = halves(2, 128, seed=7)
    exact, plain = zip(*(expected(case, x) for case in (q, k, v, *ordered)), strict=True)
    dense = [(x.to(dtype) @ head.weight.to(dtype).T).numpy() for dtype in (torch.float64, torch.float32)]
    found = product(x, weight)
    assert_as_accurate(found, np.hstack([*exact, dense[0]]), np.hstack([*plain, dense[1]]))


def test_bytes_are_those_of_the_tensors_on_the_card() -> None:
    weight = packed(plain_form(gptq_case(256, 64, 128, act_order=True, bias=True)))
    assert weight.num_bytes == 256 * 64 // 2 + 2 * 64 * (2 + 1) + 4 * 64 + 4 * 256
    plain = packed(plain_form(gptq_case(256, 64, 64, bits=3, scale_dtype=np.float32)))
    assert plain.num_bytes == 256 * 64 * 3 // 8 + 4 * 64 * (4 + 1)


def in_guarded_memory(weight: GpuLinear) -> GpuLinear:
    """The same weights, each tensor with NaN or absurd integers before and behind it."""

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else guarded(tensor.reshape(1, -1))[0].view(tensor.shape)

    def product_of(segment):
        held = {name: moved(getattr(segment, name)) for name in ("words", "high", "scales", "zeros", "bias")}
        return dataclasses.replace(segment, **held)

    orders = tuple(dataclasses.replace(order, order=moved(order.order)) for order in weight.orders)
    segments = tuple(dataclasses.replace(each, product=product_of(each.product)) for each in weight.segments)
    return dataclasses.replace(weight, orders=orders, segments=segments)


@pytest.mark.parametrize("split_rows", [0, 64])
@pytest.mark.parametrize("compute", ["fp16", "exact"])
@pytest.mark.parametrize("name", ["2 bits", "3 bits", "4 bits, act-order with uneven groups", "8 bits"])
def test_nothing_beside_a_tensor_is_read_or_written(
    name: str, compute: str, split_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SPLIT_ROWS", split_rows)
    weight = packed(plain_form(CASES[name]), compute=compute)
    x = normal(3, weight.in_features, seed=8)
    wanted = product(x, weight)
    y = guarded(torch.zeros(3, weight.out_features, device=DEVICE))
    spread = guarded(x.to(DEVICE))
    fenced = in_guarded_memory(weight)
    inputs = [prepare(spread, order) for order in fenced.orders]
    inputs = [
        Activations(guarded(each.values), None if each.scale is None else guarded(each.scale[None])[0], each.order)
        for each in inputs
    ]
    fenced.run_(inputs, y)
    assert same_bits(y.cpu().contiguous(), wanted)
    assert room_around(y).isnan().all()


@interpreted_only
@pytest.mark.parametrize("num_rows, split_rows", [(3, 64), (17, 0)])
@pytest.mark.parametrize("name", ["2 bits", "3 bits", "4 bits, act-order with uneven groups", "8 bits"])
def test_every_address_is_one_of_a_tensor(
    name: str, num_rows: int, split_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SPLIT_ROWS", split_rows)
    weight = packed(plain_form(CASES[name]))
    with inside_arguments(monkeypatch):
        product(normal(num_rows, weight.in_features), weight)


@interpreted_only
@pytest.mark.parametrize("name", ["2 bits", "3 bits", "4 bits", "8 bits", "4 bits, zero points of 16"])
def test_the_assembly_computes_what_the_plain_form_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(plain_form(CASES[name]))
    x = normal(2, weight.in_features)
    plain = product(x, weight)
    executed = teach_assembly(monkeypatch)
    monkeypatch.setattr(quantised, "ASSEMBLY", True)
    assert same_bits(product(x, weight), plain)
    assert executed and all("fma.rn.f16x2" in text for text in executed)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_products_of_any_shape_are_right(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4, 5, 6, 7, 8]), "bits")
    in_features = 32 * data.draw(st.integers(1, 5), "K / 32")
    group = data.draw(st.sampled_from([16, 32, 40, 64, 128, in_features]), "group")
    case = gptq_case(
        in_features,
        data.draw(st.integers(1, 140), "N"),
        min(group, in_features),
        bits=bits,
        planar=bits in (5, 6, 7),
        act_order=data.draw(st.booleans(), "act-order"),
        bias=data.draw(st.booleans(), "bias"),
        scale_dtype=data.draw(st.sampled_from([np.float16, np.float32]), "scales"),
        seed=data.draw(st.integers(0, 9), "seed"),
    )
    x = halves(data.draw(st.integers(1, 20), "T"), in_features, seed=9)
    compute = data.draw(st.sampled_from(["fp16", "exact"]), "compute")
    assert_as_accurate(product(x, packed(plain_form(case), compute=compute)), *expected(case, x))


def test_no_rows_give_no_rows() -> None:
    assert product(torch.empty(0, 256), packed(plain_form(CASES["4 bits"]))).shape == (0, 128)


def test_packing_nothing_or_different_inputs_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one linear layer"):
        packed()
    with pytest.raises(ShapeError, match="'wide': 256, 'narrow': 96"):
        packed(plain_form(CASES["4 bits"], "wide"), plain_form(CASES["5 bits"], "narrow"))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 255), torch.zeros(256), torch.zeros(2, 256).double(), torch.zeros(256, 2).T],
    ids=["features", "dimensions", "dtype", "layout"],
)
def test_an_input_that_does_not_fit_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"x must be \[T, 256\] float32 with contiguous features, got"):
        prepare(x, packed(plain_form(CASES["4 bits"])).orders[0])


def test_inputs_and_results_that_do_not_fit_are_refused() -> None:
    weight = packed(plain_form(CASES["4 bits"]))
    inputs = [prepare(torch.zeros(2, 256, device=DEVICE), weight.orders[0])]
    for y in (torch.zeros(2, 127), torch.zeros(3, 128), torch.zeros(2, 128).half(), torch.zeros(128, 2).T):
        with pytest.raises(ShapeError, match=r"y must be \[2, 128\] float32 with contiguous columns, got"):
            weight.run_(inputs, y.to(DEVICE))
    other = FeatureOrder(None, 256, 256, torch.float32, scaled=False)
    wrong = [prepare(torch.zeros(2, 256, device=DEVICE), other)]
    for given_inputs in ([], wrong, inputs * 2):
        with pytest.raises(ShapeError, match="in each of its 1 orders of features"):
            weight.run_(given_inputs, torch.zeros(2, 128, device=DEVICE))
