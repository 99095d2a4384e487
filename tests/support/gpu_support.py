"""What the tests of the GPU backend share: where they run, linears as the backend packs them, and their products."""

from __future__ import annotations

import numpy as np
import torch

from kernel_support import GptqCase
from ropewalk.backends.gpu.activations import prepare
from ropewalk.backends.gpu.linear import GpuLinear, pack
from ropewalk.gptq.linear import DenseLinear, GptqLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_form(case: GptqCase, name: str = "m") -> GptqLinear:
    """A random linear as it comes from a file."""
    given = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in _fields(case)}
    return GptqLinear(name=name, out_features=case.codes.shape[1], **given)


def _fields(case: GptqCase) -> list[tuple[str, object]]:
    return list(case.arguments.items())


def packed(*parts: GptqLinear | DenseLinear, compute: str = "fp16") -> GpuLinear:
    return pack(parts, DEVICE, compute)


def product(x: torch.Tensor, weight: GpuLinear, out: torch.Tensor | None = None) -> torch.Tensor:
    """x W + bias by the kernels, [T, N] on the CPU; NaN where they wrote nothing."""
    x = x.to(DEVICE)
    y = torch.full((x.shape[0], weight.out_features), float("nan"), device=DEVICE) if out is None else out
    weight.run_([prepare(x, order) for order in weight.orders], y)
    return y.cpu()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def halves(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 values that float16 holds: nothing is rounded before a product."""
    return normal(*shape, seed=seed).half().float()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int32), other.view(torch.int32))
