"""What the tests of producers of activations share: orders of features, and rows written in them."""

from __future__ import annotations

import torch

from gpu_support import DEVICE
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, prepare

K, WIDTH = 72, 96


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def permuted() -> torch.Tensor:
    """[WIDTH] int32: all K features, with padding among them."""
    order = torch.full((WIDTH,), -1, dtype=torch.int32)
    places = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:K]
    order[places] = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    return order.to(DEVICE)


ORDERS = {
    "plain": FeatureOrder(None, K, K, torch.float16, True),
    "padded": FeatureOrder(None, WIDTH, K, torch.float16, True),
    "permuted": FeatureOrder(permuted(), WIDTH, K, torch.float16, True),
    "permuted float32": FeatureOrder(permuted(), WIDTH, K, torch.float32, False),
    "plain float32": FeatureOrder(None, K, K, torch.float32, False),
}


def assert_prepared_alike(made: Activations, whole: torch.Tensor, order: FeatureOrder) -> None:
    """A producer and `prepare` of what it produced give the same bits."""
    expected = prepare(whole, order)
    assert made.order is order and made.values.dtype == order.dtype
    assert torch.equal(made.values, expected.values)
    assert (made.scale is None) == (not order.scaled)
    assert made.scale is None or torch.equal(made.scale, expected.scale)
