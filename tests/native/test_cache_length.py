"""A cache knows which positions it holds: none is read that was not written, and writing leaves no gap."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kernel_support import same_bits
from ropewalk import _core, native
from ropewalk.base.errors import ShapeError

RUNTIME = native.Runtime(None, 1)


class Cache:
    """2 heads of 8, keys and values of opposite sign."""

    def __init__(self, capacity: int = 100) -> None:
        self._cache = native.KvCache(RUNTIME, 2, 8, capacity, "f32")

    def append(self, k: torch.Tensor, start: int) -> None:
        self._cache.append_(k, -k, start)

    def attend(self, q: torch.Tensor, start: int) -> torch.Tensor:
        return self._cache.attend(q, start)


def refused(message: str):
    return pytest.raises(ShapeError, match=re.escape(message))


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(seed))


def test_keys_that_were_never_appended_are_not_read():
    cache = Cache()
    with refused("keys that were not appended"):
        cache.attend(rows(1), 0)
    cache.append(rows(3), 0)
    cache.attend(rows(3), 0)
    for start, count in ((0, 4), (1, 3), (3, 1), (90, 1)):
        with refused("keys that were not appended"):
            cache.attend(rows(count), start)


def test_an_append_leaves_no_gap():
    cache = Cache()
    with refused("positions 1 to 2 would leave a gap"):
        cache.append(rows(1), 1)
    cache.append(rows(3), 0)
    with refused("positions 4 to 6 would leave a gap"):
        cache.append(rows(2), 4)
    cache.append(rows(2), 3)
    assert cache.attend(rows(5), 0).shape == (5, 16)


def test_writing_a_position_again_forgets_what_followed_it():
    """The keys beyond belong to what was there before: a sequence that took another turn must not see them."""
    cache = Cache()
    cache.append(rows(6, 1), 0)
    cache.append(rows(2, 2), 3)
    with refused("keys that were not appended"):
        cache.attend(rows(1), 5)
    fresh = Cache()
    fresh.append(torch.cat([rows(6, 1)[:3], rows(2, 2)]), 0)
    assert same_bits(cache.attend(rows(5), 0), fresh.attend(rows(5), 0))
    cache.append(rows(2), 5)
    cache.attend(rows(7), 0)


def test_appending_nothing_changes_nothing():
    cache = Cache()
    cache.append(rows(3), 0)
    cache.append(rows(0), 1)
    cache.attend(rows(3), 0)
    with refused("would leave a gap"):
        cache.append(rows(0), 4)
    assert cache.attend(rows(0), 3).shape == (0, 16)


def test_a_refused_append_leaves_the_length_as_it_was():
    cache = native.KvCache(RUNTIME, 2, 8, 10)
    cache.append_(rows(4), rows(4), 0)
    with refused("heads"):
        cache.append_(rows(1)[:, :1].contiguous(), rows(1), 2)
    assert cache.length == 4


def test_positions_near_the_end_of_int64_are_refused_without_overflow():
    core, cache = RUNTIME.core, _core.KvCache(2, 8, 10, "f16")
    x, out = np.zeros((3, 2, 8), np.float32), np.zeros((3, 16), np.float32)
    for start in (2**63 - 1, 2**63 - 3, -(2**63)):
        with refused("do not fit a cache of 64"):
            _core.append(core, cache, x, x, start)
        with refused("lie outside a cache of 64"):
            _core.attend(core, x, cache, start, 0, 1.0, 0.0, "int8", out)
