"""Rows with their experts, as products with stacked weights take them: one by one, or in tiles of the same expert."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DIRECT_PAIRS = 128  # up to so many are a program each: the 16 rows of a captured step with 8 experts each


@dataclass(frozen=True, slots=True, eq=False)
class GroupedPairs:
    """order: [P] int32, the pairs by their experts. tiles: [., 3] int32 (expert, first place in `order`, how many)."""

    order: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """experts: [P] int32, of each pair. num_experts: E."""

    experts: torch.Tensor
    num_experts: int
    _grouped: dict[int, GroupedPairs] = field(default_factory=dict)  # by rows of a tile

    @property
    def count(self) -> int:
        """P."""
        return self.experts.shape[0]

    @property
    def are_few(self) -> bool:
        """Whether each is a program of its own."""
        return self.count <= DIRECT_PAIRS

    def grouped(self, tile_rows: int) -> GroupedPairs:
        """In tiles of up to so many pairs."""
        if tile_rows not in self._grouped:
            self._grouped[tile_rows] = grouped(self.experts, self.num_experts, tile_rows)
        return self._grouped[tile_rows]


def grouped(experts: torch.Tensor, num_experts: int, tile_rows: int) -> GroupedPairs:
    """Pairs put together by expert, in their order; nothing is waited for, so there are as many tiles as may be needed.

    experts: [P] int32, each in 0..num_experts. Tiles that are not needed have no pairs.
    """
    device = experts.device
    ordered, order = torch.sort(experts, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(num_experts + 1, dtype=torch.int32, device=device))  # [E + 1]
    needed = (edges.diff() + tile_rows - 1) // tile_rows  # [E]
    ends = needed.cumsum(0)
    most = min(len(experts), num_experts) + len(experts) // tile_rows
    tile = torch.arange(most, device=device)
    expert = torch.searchsorted(ends, tile, right=True).clamp(max=num_experts - 1)  # [most]
    first = edges[expert] + (tile - ends[expert] + needed[expert]) * tile_rows
    count = (edges[expert + 1] - first).clamp(0, tile_rows)
    return GroupedPairs(order.to(torch.int32), torch.stack([expert, first, count], dim=1).to(torch.int32))
