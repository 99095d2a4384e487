"""The weights of one linear, in plain form: the on-disk GPTQ format with all its quirks ends here.

    W[k, n] = scales[group(k), n] * (code[k, n] - zeros[group(k), n])         y = x W + bias        (W is [K, N])

Reading copies nothing large: qweight stays as it was read, zero points and groups are small.

g_idx says which group each input row belongs to. Act-order files have any assignment; kernels walk the rows in a stable
sort by group. Where it is absent, all -1 (never set), or all zero with several groups (old GPTQ-for-LLaMa), row k
belongs to group k // group_size (docs/formats.md, "g_idx").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ropewalk.base.errors import CheckpointError
from ropewalk.config.quantisation import QuantSettings
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.bits import unpack_rows
from ropewalk.gptq.shapes import has_premultiplied_zeros, infer_settings, shape_problems
from ropewalk.gptq.zeros import is_planar, read_packed_zeros, read_premultiplied_zeros


@dataclass(frozen=True, slots=True, eq=False)
class GptqLinear:
    """A quantised linear. "Sorted" rows are the K inputs ordered by group; group g owns sorted rows
    [group_starts[g], group_starts[g+1]), possibly none."""

    name: str
    bits: int  # 2 to 8
    in_features: int  # K
    out_features: int  # N
    planar: bool  # False: one bit stream down K (2, 3, 4, 8 bits); True: bit planes (gptq/bits.py)
    qweight: torch.Tensor  # [K*bits/32, N] int32, contiguous, as stored: read only
    scales: torch.Tensor  # [G, N] float16 or float32 (bfloat16 is widened)
    zeros: torch.Tensor  # [G, N] uint8, true zero points
    group_starts: torch.Tensor  # [G+1] int64
    order: torch.Tensor | None  # [K] int32: sorted row i is original row order[i]; None: already sorted
    bias: torch.Tensor | None  # [N] float32; None also if the stored one is all zero
    rounds_inputs: bool = True  # in "int8"; False: activations stay float32, as for a head that was stored in floats

    def group_index(self) -> torch.Tensor:
        """[K] int64: the group of each original row."""
        sizes = self.group_starts.diff()
        groups = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)  # [K], sorted
        if self.order is None:
            return groups
        return torch.empty_like(groups).scatter_(0, self.order.long(), groups)

    def codes(self) -> torch.Tensor:
        """[K, N] uint8: the stored codes, in the original order of the rows."""
        return unpack_rows(self.qweight, self.bits, self.planar)

    def dequantise(self) -> torch.Tensor:
        """[K, N] float32: scale * (code - zero), original order of the rows, one rounding at most (fp32 scales).

        Slow and exact: the yardstick of every kernel.
        """
        groups = self.group_index()
        out = self.codes().float()
        return out.sub_(self.zeros.float()[groups]).mul_(self.scales.float()[groups])


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """A linear that is not quantised."""

    name: str
    weight: torch.Tensor  # [N, K] float16, bfloat16 or float32, contiguous, as stored: read only
    bias: torch.Tensor | None  # [N] float32; None also if the stored one is all zero


class Expert(NamedTuple):
    """The linears of one expert: gate and up map C to I, down I to C."""

    gate: GptqLinear | DenseLinear
    up: GptqLinear | DenseLinear
    down: GptqLinear | DenseLinear


def read_gptq_linear(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings | None
) -> GptqLinear:
    """Module `name` (the part before ".qweight"), K -> N. settings None: inferred from the shapes.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or dtype, a g_idx out of range, or a scale or bias
            that is not finite.
    """
    if settings is None:
        settings = infer_settings(checkpoint, name, in_features)
    problems = shape_problems(checkpoint, name, in_features, out_features, settings)
    if problems:
        raise CheckpointError("; ".join(problems))
    scales, zeros = _read_scales_and_zeros(checkpoint, name, settings)
    starts, order = read_groups(checkpoint, f"{name}.g_idx", in_features, scales.shape[0], settings)
    return GptqLinear(
        name=name,
        bits=settings.bits,
        in_features=in_features,
        out_features=out_features,
        planar=is_planar(settings),
        qweight=checkpoint.tensor(f"{name}.qweight"),
        scales=scales,
        zeros=zeros,
        group_starts=starts,
        order=order,
        bias=read_bias(checkpoint, name),
    )


def read_bias(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """The bias [N] of module `name` in float32; None if it is absent or all zero, as those that AutoGPTQ adds."""
    tensor = f"{name}.bias"
    if tensor not in checkpoint:
        return None
    bias = checkpoint.tensor(tensor).to(torch.float32, copy=True)
    require_finite(bias, tensor)
    return bias if bool(bias.any()) else None


def require_finite(values: torch.Tensor, name: str) -> None:
    """Raises CheckpointError if a value of tensor `name` is NaN or infinite."""
    # The extremes first (a NaN is one): in float16 20 times faster than asking every value, which took a third of the
    # time of loading a model.
    if values.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        finite = torch.isfinite(values)
        position = (~finite).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name}: {int((~finite).sum())} of {values.numel()} values are NaN or infinite (the first at {position}): "
            "the file is damaged, or its quantisation failed"
        )


def _read_scales_and_zeros(
    checkpoint: Checkpoint, name: str, settings: QuantSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales [G, N] float16 or float32, zero points [G, N] uint8)."""
    scales = checkpoint.tensor(f"{name}.scales")
    require_finite(scales, f"{name}.scales")
    if scales.dtype == torch.bfloat16:
        scales = scales.float()
    if has_premultiplied_zeros(checkpoint, name):
        zeros = checkpoint.tensor(f"{name}.zeros")
        points = read_premultiplied_zeros(zeros, scales, settings.bits, f"{name}.zeros")
        return scales.T.contiguous(), points
    qzeros = checkpoint.tensor(f"{name}.qzeros")
    return scales, read_packed_zeros(qzeros, settings, f"{name}.qzeros", checkpoint.warn_once)


def read_groups(
    checkpoint: Checkpoint, tensor: str, in_features: int, num_groups: int, settings: QuantSettings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `sorted_groups`, of the groups that a tensor names; in runs where it is not there, or says nothing."""
    if tensor in checkpoint:
        g_idx = checkpoint.tensor(tensor)
        runs = _groups_in_runs(in_features, settings.group_size, g_idx.dtype)
        is_plain = int(runs[-1]) < num_groups and torch.equal(g_idx, runs)
        if not is_plain and not is_unset(g_idx, num_groups):
            return sorted_groups(g_idx, num_groups, tensor)
    return sequential_groups(in_features, settings.group_size), None


@lru_cache(maxsize=16)
def _groups_in_runs(in_features: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The g_idx of rows in order: [K], not to be changed. Most files have it, and then there is nothing to sort."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features).div(size, rounding_mode="floor").to(dtype)


def sequential_groups(in_features: int, group_size: int) -> torch.Tensor:
    """group_starts [G+1] int64 of rows in order; group_size -1: one group. The last group may be shorter."""
    size = in_features if group_size == -1 else group_size
    num_groups = -(-in_features // size)
    return (torch.arange(num_groups + 1) * size).clamp_(max=in_features)


def is_unset(g_idx: torch.Tensor, num_groups: int) -> bool:
    """True if g_idx carries no information although there is more than one group."""
    return bool((g_idx == -1).all()) or (num_groups > 1 and not bool(g_idx.any()))


def sorted_groups(g_idx: torch.Tensor, num_groups: int, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(group_starts [G+1] int64, order [K] int32, or None if the rows are already sorted by group).

    g_idx: [K] int32 or int64.

    Raises:
        CheckpointError: a group below 0 or beyond the last one.
    """
    wrong = (g_idx < 0) | (g_idx >= num_groups)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{name}: {int(wrong.sum())} of {g_idx.numel()} entries name no group (row {row}: {int(g_idx[row])}; "
            f"0 to {num_groups - 1} are accepted): the file is damaged"
        )
    starts = torch.zeros(num_groups + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(g_idx, minlength=num_groups).cumsum(0)
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return starts, None
    return starts, torch.argsort(g_idx, stable=True).to(torch.int32)
