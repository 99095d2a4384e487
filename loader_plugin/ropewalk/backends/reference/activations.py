"""The functions of feed-forward blocks in plain torch."""

from __future__ import annotations

import torch

from ropewalk.families.program import Activation


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """x: [...] float32 -> f(x)."""
    match activation:
        case Activation.SILU:
            return torch.nn.functional.silu(x)
        case Activation.GELU:
            return torch.nn.functional.gelu(x)
        case Activation.GELU_TANH:
            return torch.nn.functional.gelu(x, approximate="tanh")
