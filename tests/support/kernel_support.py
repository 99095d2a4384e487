"""What the kernel tests share: random GPTQ linears with their exact weights, strided rows, equal bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from gptq_writer import pack_rows
from ropewalk import native

ISAS = native.available_isas()
every_isa = pytest.mark.parametrize("isa", ISAS)


@dataclass(frozen=True)
class GptqCase:
    """A random GPTQ linear in the plain form that `native.pack_gptq` takes, beside its codes."""

    arguments: dict
    codes: np.ndarray  # [K, N] in stored row order
    order: np.ndarray  # [K]
    group_starts: np.ndarray  # [G + 1]
    scales: np.ndarray  # [G, N] float64
    zeros: np.ndarray  # [G, N] float64
    bias: np.ndarray  # [N] float64

    def weight(self) -> np.ndarray:
        """W[k, n] = scale * (code - zero) in float64, [K, N]."""
        weight = np.empty(self.codes.shape)
        for group, (begin, end) in enumerate(zip(self.group_starts[:-1], self.group_starts[1:], strict=True)):
            rows = self.order[begin:end]
            weight[rows] = self.scales[group] * (self.codes[rows] - self.zeros[group])
        return weight

    def blocks(self) -> list[tuple[int, np.ndarray]]:
        """(group, stored rows) of every block of at most 32 sorted rows."""
        pairs = zip(self.group_starts[:-1], self.group_starts[1:], strict=True)
        return [
            (group, self.order[first : min(first + 32, end)])
            for group, (begin, end) in enumerate(pairs)
            for first in range(begin, end, 32)
        ]

    def pack(self, runtime: native.Runtime):
        return native.pack_gptq(runtime, **self.arguments)


def gptq_case(
    in_features: int,
    out_features: int,
    group_sizes: Sequence[int] | int = 32,
    *,
    bits: int = 4,
    act_order: bool = False,
    planar: bool = False,
    scale_dtype: type = np.float16,
    constant_zero: int | None = None,
    bias: bool = False,
    seed: int = 0,
) -> GptqCase:
    """group_sizes: of every group in sorted rows, or one size (the last group takes what is left)."""
    rng = np.random.default_rng([seed, in_features, out_features, bits])
    if isinstance(group_sizes, int):
        whole = in_features // group_sizes
        group_sizes = [group_sizes] * whole + ([in_features % group_sizes] if in_features % group_sizes else [])
    starts = np.concatenate([[0], np.cumsum(group_sizes)]).astype(np.int64)
    assert starts[-1] == in_features
    groups = len(group_sizes)
    # Rows past K up to a whole word hold random bits, which must not matter.
    stored = rng.integers(0, 1 << bits, (-(-in_features // 32) * 32, out_features))
    word_rows = -(-in_features // 32) * bits if planar else -(-in_features * bits // 32)
    qweight = pack_rows(stored, bits, planar and bits in (3, 5, 6, 7))[:word_rows]
    order = rng.permutation(in_features) if act_order else np.arange(in_features)
    scales = (0.01 + 0.02 * rng.random((groups, out_features))).astype(scale_dtype)
    if constant_zero is None:
        zeros = rng.integers(0, 1 << bits, (groups, out_features)).astype(np.uint8)
    else:
        zeros = np.full((groups, out_features), constant_zero, np.uint8)
    bias_values = rng.standard_normal(out_features).astype(np.float32) if bias else None
    return GptqCase(
        arguments={
            "qweight": np.ascontiguousarray(qweight),
            "bits": bits,
            "in_features": in_features,
            "scales": scales,
            "zeros": zeros,
            "group_starts": starts,
            "order": order.astype(np.int32) if act_order else None,
            "bias": bias_values,
            "planar": planar,
        },
        codes=stored[:in_features],
        order=order,
        group_starts=starts,
        scales=scales.astype(np.float64),
        zeros=zeros.astype(np.float64),
        bias=np.zeros(out_features) if bias_values is None else bias_values.astype(np.float64),
    )


def spread_rows(array: np.ndarray, gap: int = 5) -> np.ndarray:
    """The same values as a view whose rows lie further apart, with NaN between them."""
    room = np.full((array.shape[0], array[0].size + gap), np.nan, np.float32)
    view = room[:, : array[0].size]
    view[:] = array.reshape(array.shape[0], -1)
    strides = (room.strides[0], *array.strides[1:])
    return np.lib.stride_tricks.as_strided(room, array.shape, strides)


def same_bits(a, b) -> bool:
    """Equal bit for bit, NaN included."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
