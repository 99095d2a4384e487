"""Products with dense weights: every dtype, nearly float32 on tensor cores, the same bits for any rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_support import DEVICE, normal, packed, product, same_bits
from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.linear import GpuLinear
from ropewalk.gptq.linear import DenseLinear
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around, teach_tf32

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(64, 64), (256, 70), (100, 33), (33, 1), (1, 5)]


def dense(in_features: int, out_features: int, dtype: torch.dtype, bias: bool = False) -> DenseLinear:
    weight = normal(out_features, in_features, seed=5).to(dtype)
    return DenseLinear("dense", weight, normal(out_features, seed=6) if bias else None)


def expected(x: torch.Tensor, *parts: DenseLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, and by torch in float32."""

    def one(part: DenseLinear, dtype: torch.dtype) -> torch.Tensor:
        y = x.to(dtype) @ part.weight.to(dtype).T
        return y if part.bias is None else y + part.bias.to(dtype)

    return tuple(torch.cat([one(part, dtype) for part in parts], dim=1) for dtype in (torch.float64, torch.float32))


@pytest.mark.parametrize("compute", ["fp16", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, out_features", SHAPES)
def test_products_are_as_accurate_as_float32(in_features, out_features, dtype, compute) -> None:
    linear = dense(in_features, out_features, dtype, bias=out_features != 64)
    x = normal(3, in_features)
    weight = packed(linear, compute=compute)
    assert_as_accurate(product(x, weight), *expected(x, linear))
    assert weight.num_bytes == linear.weight.nbytes + (0 if linear.bias is None else 4 * out_features)


@interpreted_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_see_weights_exactly_and_activations_in_two_numbers(dtype, monkeypatch) -> None:
    linear, x = dense(200, 64, dtype), normal(4, 200)
    seen = teach_tf32(monkeypatch)
    found = product(x, packed(linear))
    assert set(seen) == ({"IEEE"} if dtype == torch.float32 else {"TF32"})
    exact, _ = expected(x, linear)
    sizes = x.double().abs() @ linear.weight.double().abs().T
    assert ((found.double() - exact).abs() <= 2.0**-20 * sizes).all()
    in_one = product((x.view(torch.int32) & -8192).view(torch.float32), packed(linear))
    assert ((in_one.double() - exact).abs() > 2.0**-14 * sizes).any()  # what one number would give


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(dense(200, 40, dtype, bias=True))
    assert weight.segments[0].product.splits > 1
    x = normal(40, 200, seed=2)
    whole = product(x, weight)
    for num_rows in (1, 2, 3, 7, 16, 17):
        assert same_bits(product(x[40 - num_rows :], weight), whole[40 - num_rows :]), num_rows
    monkeypatch.setattr(tiles, "SPLIT_ROWS", 0)
    for num_rows in (1, 17, 40):
        assert same_bits(product(x[:num_rows], weight), whole[:num_rows]), num_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_8_rows_and_of_16_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed(dense(200, 40, dtype)), normal(8, 200, seed=2)
    found = product(x, weight)
    monkeypatch.setattr(tiles, "generation", lambda device: 0)
    assert same_bits(product(x, weight), found)


def test_weights_of_one_dtype_side_by_side_are_multiplied_at_once() -> None:
    parts = [dense(64, 20, torch.float16), dense(64, 12, torch.float16, bias=True), dense(64, 8, torch.bfloat16)]
    weight = packed(*parts)
    assert [(segment.first, segment.end) for segment in weight.segments] == [(0, 32), (32, 40)]
    assert len(weight.orders) == 1
    x = normal(2, 64)
    assert_as_accurate(product(x, weight), *expected(x, *parts))


def test_a_weight_alone_is_used_as_it_is() -> None:
    linear = dense(64, 20, torch.float16)
    on_device = dataclasses.replace(linear, weight=linear.weight.to(DEVICE))
    assert packed(on_device).segments[0].product.weight is on_device.weight


@pytest.mark.parametrize("split_rows", [0, 64])
@pytest.mark.parametrize("in_features, dtype", [(100, torch.float16), (128, torch.bfloat16), (70, torch.float32)])
def test_nothing_beside_a_tensor_is_read_or_written(in_features, dtype, split_rows, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "SPLIT_ROWS", split_rows)
    weight, x = packed(dense(in_features, 33, dtype, bias=True)), normal(3, in_features).to(DEVICE)
    wanted = product(x, weight)
    y = guarded(torch.zeros(3, 33, device=DEVICE))
    assert same_bits(product(guarded(x), in_guarded_memory(weight), y).contiguous(), wanted)
    assert room_around(y).isnan().all()


def in_guarded_memory(weight: GpuLinear) -> GpuLinear:
    """The same weight and bias, with NaN before and behind them."""
    segment = weight.segments[0]
    held = {name: getattr(segment.product, name) for name in ("weight", "bias")}
    fenced = {name: guarded(tensor.reshape(1, -1))[0].view(tensor.shape) for name, tensor in held.items()}
    product_of = dataclasses.replace(segment.product, **fenced)
    return dataclasses.replace(weight, segments=(dataclasses.replace(segment, product=product_of),))


@interpreted_only
@pytest.mark.parametrize("split_rows", [0, 64])
@pytest.mark.parametrize("in_features", [100, 128])
def test_every_address_is_one_of_a_tensor(in_features: int, split_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "SPLIT_ROWS", split_rows)
    with inside_arguments(monkeypatch):
        product(guarded(normal(17, in_features)), packed(dense(in_features, 70, torch.float16, bias=True)))
