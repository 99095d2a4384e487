"""Activations in the order of a linear: scaled by powers of two, gathered, padded with zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_support import DEVICE, normal
from ropewalk.backends.gpu import activations_kernel
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, prepare
from triton_interpreter import guarded, inside_arguments, interpreted_only

K, WIDTH = 70, 96


def permuted() -> torch.Tensor:
    """[WIDTH] int32: all features, with padding among them."""
    at = torch.from_numpy(np.random.default_rng(1).permutation(WIDTH)[:K])
    order = torch.full((WIDTH,), -1, dtype=torch.int32)
    order[at] = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    return order.to(DEVICE)


def order_of(order: torch.Tensor | None, dtype: torch.dtype, scaled: bool, width: int = WIDTH) -> FeatureOrder:
    return FeatureOrder(order, width, K, dtype, scaled)


def restored(made: Activations) -> torch.Tensor:
    """[T, WIDTH] float64: what the kernels take the activations for."""
    values = made.values.double()
    return values if made.scale is None else values * made.scale.double()[:, None]


def gathered(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    padded = torch.cat([x, torch.zeros(x.shape[0], WIDTH - K, device=x.device)], dim=1)
    if order is None:
        return padded
    return torch.where(order >= 0, padded[:, order.clamp(min=0).long()], 0.0)


@pytest.mark.parametrize("block", [32, 2048])
@pytest.mark.parametrize("order", [None, permuted()], ids=["plain", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_are_gathered_and_padded(dtype, order, block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations_kernel, "BLOCK", block)
    x = normal(3, K).half().float().to(DEVICE)
    made = prepare(guarded(x), order_of(order, dtype, scaled=dtype == torch.float16))
    assert (made.values.shape, made.values.dtype) == ((3, WIDTH), dtype)
    assert torch.equal(restored(made), gathered(x, order).double())


def test_the_scale_of_a_row_is_the_power_of_two_that_brings_its_largest_below_16384() -> None:
    largest = torch.tensor([1.0, 1.99, 2.0, 8192.0, 16383.9, 16384.0, 1e30, 3e38, 1e-6, 1e-30, 0.0, 1e-45])
    x = torch.zeros(len(largest), K)
    x[:, 3] = -largest
    made = prepare(x.to(DEVICE), order_of(None, torch.float16, scaled=True))
    scale, values = made.scale.cpu(), made.values.cpu().double()
    assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5))
    there = largest >= 1e-30
    assert ((values[there, 3].abs() >= 8192) & (values[there, 3].abs() <= 16384)).all()
    assert (values[~there, 3].abs() < 1e-6).all()  # zero, and what is below 2^-113
    exact = x[there, 3].double()
    assert ((restored(made).cpu()[there, 3] - exact).abs() <= exact.abs() * 2.0**-11).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_and_leaves_the_rest_finite(value: float) -> None:
    x = normal(2, K)
    x[1, 4], x[1, 5] = value, 3e38
    values = prepare(x.to(DEVICE), order_of(None, torch.float16, scaled=True)).values.cpu()
    assert torch.equal(values[1, 4].isnan(), torch.tensor(value).isnan())
    assert values[1, 4] == value or values[1, 4].isnan()
    assert values[:, :4].isfinite().all() and values[1, 5:].isfinite().all()


def test_rows_that_are_already_as_a_linear_reads_them_are_not_copied() -> None:
    x = normal(3, K).to(DEVICE)
    assert prepare(x, order_of(None, torch.float32, scaled=False, width=K)).values is x


def test_orders_match_by_their_entries() -> None:
    one = order_of(permuted(), torch.float16, scaled=True)
    assert one.matches(one) and one.matches(order_of(permuted(), torch.float16, scaled=True))
    other = permuted().flip(0)
    assert not one.matches(order_of(other, torch.float16, scaled=True))
    assert not one.matches(order_of(None, torch.float16, scaled=True))
    assert not one.matches(order_of(permuted(), torch.float32, scaled=False))


@interpreted_only
@pytest.mark.parametrize("order", [None, permuted()], ids=["plain", "permuted"])
def test_every_address_is_one_of_a_tensor(order, monkeypatch: pytest.MonkeyPatch) -> None:
    with inside_arguments(monkeypatch):
        prepare(guarded(normal(2, K)), order_of(order, torch.float16, scaled=True))
