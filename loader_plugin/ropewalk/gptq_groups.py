"""g_idx: which quantisation group each input row belongs to, as a stable sort of the rows by group.

Act-order files have any assignment; the sorted order is what kernels walk. What writers leave in g_idx (B.3):
absent, all -1 (never set) or all zero with several groups (old GPTQ-for-LLaMa) mean row // group_size.
"""

from __future__ import annotations

import torch

from ropewalk.errors import CheckpointError


def sequential_groups(in_features: int, group_size: int) -> torch.Tensor:
    """group_starts [G+1] int64 of rows in order; group_size -1: one group. The last group may be shorter."""
    size = in_features if group_size == -1 else group_size
    num_groups = -(-in_features // size)
    return (torch.arange(num_groups + 1) * size).clamp_(max=in_features)


def is_unset(g_idx: torch.Tensor, num_groups: int) -> bool:
    """True where g_idx carries no information although there is more than one group."""
    return bool((g_idx == -1).all()) or (num_groups > 1 and not bool(g_idx.any()))


def sorted_groups(g_idx: torch.Tensor, num_groups: int, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(group_starts [G+1] int64, order [K] int32 or None where the rows are already sorted by group).

    g_idx: [K] int32 or int64.

    Raises:
        CheckpointError: a group below 0 or beyond the last one.
    """
    wrong = (g_idx < 0) | (g_idx >= num_groups)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{name}: {int(wrong.sum())} of {g_idx.numel()} entries are no group (row {row}: {int(g_idx[row])}; "
            f"0 to {num_groups - 1} are accepted): the file is damaged"
        )
    starts = torch.zeros(num_groups + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(g_idx, minlength=num_groups).cumsum(0)
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return starts, None
    return starts, torch.argsort(g_idx, stable=True).to(torch.int32)
