"""What turns cached keys: the difference of two rotations, as tables of cos and sin.

A key at position p was multiplied by a rotation of angle p * inv and by the attention scale a, pair by pair:

    other frequencies:     angle p * (inv_new - inv_old), scale a_new / a_old
    moved down by d:       angle -d * inv, whatever p is

Angles are computed in float64. Turning a key rounds it once more to the format of the cache; the values stay.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ropewalk.base.errors import ConfigError
from ropewalk.model.cache import Frequencies


def turn_tables(before: Frequencies, after: Frequencies, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin that turn keys of positions start..end from one rotation to another: [end - start, R/2] float32."""
    difference = inverse_frequencies(after) - inverse_frequencies(before)  # [R/2]
    angles = np.arange(start, end, dtype=np.float64)[:, None] * difference  # [end - start, R/2]
    return _tables(angles, after.attention_scale / before.attention_scale)


def shift_tables(
    frequencies: Frequencies, sliding: np.ndarray | None, distance: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin that turn keys to positions lower by `distance`: [tables, num_rows, R/2] float32, all rows alike.

    sliding: [R/2] radians per position of layers with a window, where they turn otherwise (`Rope.sliding_frequencies`).
    """
    each = [inverse_frequencies(frequencies), *([] if sliding is None else [sliding])]
    cos, sin = _tables(-distance * np.stack(each)[:, None], 1.0)  # [tables, 1, R/2]
    return np.repeat(cos, num_rows, axis=1), np.repeat(sin, num_rows, axis=1)


def check_turns(before: Frequencies, after: Frequencies) -> None:
    """Raises:
    ConfigError: the two rotate different numbers of features, so no rotation leads from one to the other.
    """
    theirs, ours = (2 * len(inverse_frequencies(each)) for each in (before, after))
    if theirs != ours:
        raise ConfigError(
            f"mode='rotate': the cached keys have {theirs} rotated features, the RoPE asked for has {ours}, and keys "
            "cannot be turned from one to the other: give mode='recompute'"
        )


@lru_cache(maxsize=8)
def inverse_frequencies(frequencies: Frequencies) -> np.ndarray:
    """[R/2] float64 radians per position."""
    return np.frombuffer(frequencies.inverse_frequencies, dtype=np.float64)


def _tables(angles: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
