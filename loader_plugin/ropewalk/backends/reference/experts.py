"""Mixture of experts in plain torch: expert by expert, over the rows that have chosen it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.reference.activations import activate
from ropewalk.backends.reference.linear import ReferenceLinear, pack, product
from ropewalk.base.errors import ShapeError
from ropewalk.families.program import Activation
from ropewalk.gptq.linear import Expert


@dataclass(frozen=True, slots=True)
class ReferenceExperts:
    """(gate and up, down) of every expert of a layer, on the device of the backend."""

    experts: tuple[tuple[ReferenceLinear, ReferenceLinear], ...]

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors of all experts."""
        return sum(linear.num_bytes for pair in self.experts for linear in pair)

    def product(self, x: torch.Tensor, routes: torch.Tensor, activation: Activation, compute: str) -> torch.Tensor:
        """x: [T, C], routes: [T, 2, top_k] -> the sum over each row's experts, in their order, of share * y: [T, C]."""
        chosen, shares = routes[:, 0].long(), routes[:, 1]  # [T, top_k] each
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():  # ascending
            rows, places = (chosen == number).nonzero(as_tuple=True)
            gate_up, down = self.experts[number]
            gate, up = product(x[rows], gate_up, compute).chunk(2, dim=1)  # [rows, I] each
            y = product(activate(gate, activation) * up, down, compute)  # [rows, C]
            out[rows] += shares[rows, places, None] * y
        return out


def pack_experts(experts: Sequence[Expert], device: torch.device) -> ReferenceExperts:
    """Move the experts to the device; nothing is rearranged."""
    packed = tuple((pack([expert.gate, expert.up], device), pack([expert.down], device)) for expert in experts)
    sizes = {(up.in_features, up.out_features, down.in_features, down.out_features) for up, down in packed}
    if len(sizes) != 1:
        raise ShapeError(f"pack_experts: experts of a layer have one size, these have {sorted(sizes)}")
    return ReferenceExperts(packed)
