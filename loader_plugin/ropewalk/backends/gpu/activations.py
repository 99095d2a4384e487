"""What a linear reads: rows in its own order of features, in the dtype of its product, with a scale for each row.

x[t, order[i]] = values[t, i] * scale[t]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class FeatureOrder:
    """How a linear wants its input. Linears that read it alike share one of these.

    order: [width] int32, the feature of each place, -1 where a group is padded; None: features as they are.
    """

    order: torch.Tensor | None
    width: int
    in_features: int
    dtype: torch.dtype
    scaled: bool


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """values: [T, width] in the dtype of the order; scale: [T] float32, powers of two, or None where all are 1."""

    values: torch.Tensor
    scale: torch.Tensor | None
    order: FeatureOrder
