"""Counting positions, comparing prefixes, remembering how each was computed."""

from __future__ import annotations

import copy
import threading

import pytest

from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.files.embedded import demo_model_path
from ropewalk.model.cache import Frequencies, KvCache, Origin
from ropewalk.model.loader import load_model


class Owner:
    """Stands for a model."""


SHORT, LONG = Origin(Frequencies(b"short", 1.0)), Origin(Frequencies(b"long", 1.0))


def empty() -> KvCache:
    return KvCache(Owner(), threading.RLock(), CacheFormat.parse("fp16"), 100)


def filled(*spans: tuple[list[int], Origin]) -> KvCache:
    cache = empty()
    for token_ids, origin in spans:
        cache.record_(token_ids, origin, cache.length + len(token_ids))
    return cache


def test_length_and_token_ids_follow_what_is_recorded_and_truncated() -> None:
    cache = filled(([5, 6, 7], SHORT), ([8], SHORT))
    assert (cache.length, cache.token_ids) == (4, [5, 6, 7, 8])
    cache.truncate(2)
    assert (cache.length, cache.token_ids) == (2, [5, 6])
    cache.truncate(0)
    assert cache.token_ids == []


def test_a_copy_is_a_fork_and_needs_the_model() -> None:
    owner = Owner()
    cache = KvCache(owner, threading.RLock(), CacheFormat.parse("fp16"), 100)
    cache.record_([5, 6], SHORT, 2)
    other = copy.copy(cache)
    other.record_([7], SHORT, 3)
    assert (cache.token_ids, other.token_ids) == ([5, 6], [5, 6, 7])
    del owner
    with pytest.raises(RequestError, match="cannot be forked: its model is gone"):
        cache.fork()


def test_token_ids_are_a_copy() -> None:
    cache = filled(([5, 6], SHORT))
    cache.token_ids.append(7)
    assert cache.token_ids == [5, 6]


@pytest.mark.parametrize("length", [-1, 3, 1.0, True, None])
def test_truncating_to_what_is_not_cached_is_refused(length: object) -> None:
    with pytest.raises(RequestError, match="holds 2 positions"):
        filled(([5, 6], SHORT)).truncate(length)


@pytest.mark.parametrize(
    "token_ids, origin, shared",
    [
        ([5, 6, 7, 8], SHORT, 3),  # the last position was rotated by LONG
        ([5, 6, 7, 8], LONG, 0),
        ([5, 6, 9], SHORT, 2),
        ([5, 6], SHORT, 2),
        ([9], SHORT, 0),
        ([], SHORT, 0),
        ([5, 6, 7, 8], Origin(Frequencies(b"short", 1.25)), 0),
        ([5, 6, 7, 8], Origin(Frequencies(b"short", 1.0), ((1, 1.0),)), 0),
    ],
)
def test_a_prefix_is_common_in_tokens_and_in_origin(token_ids, origin, shared) -> None:
    assert filled(([5, 6], SHORT), ([7], SHORT), ([8], LONG)).common_prefix(token_ids, origin) == shared


def test_truncation_forgets_the_origin_of_what_it_drops() -> None:
    cache = filled(([5, 6], SHORT), ([7, 8], LONG))
    cache.truncate(2)
    cache.record_([9], SHORT, 100)
    assert cache.common_prefix([5, 6, 9], SHORT) == 3


def test_truncation_inside_a_span_keeps_its_origin() -> None:
    cache = filled(([5, 6], SHORT), ([7, 8], LONG))
    cache.truncate(3)
    cache.record_([9], SHORT, 100)
    assert cache.common_prefix([5, 6, 7, 9], SHORT) == 2


def test_segments_are_stretches_of_equal_origin_with_a_length_that_covers_them() -> None:
    cache = empty()
    assert cache.segments == []
    for count, origin, seq_len in ((2, SHORT, 10), (1, SHORT, 4), (3, SHORT, 12), (4, LONG, 30), (1, SHORT, 30)):
        cache.record_([5] * count, origin, seq_len)
    assert cache.segments == [(0, 6, 12), (6, 10, 30), (10, 11, 30)]
    cache.truncate(7)
    assert cache.segments == [(0, 6, 12), (6, 7, 30)]
    cache.truncate(6)
    assert cache.segments == [(0, 6, 12)]
    cache.truncate(0)
    assert cache.segments == []


@pytest.mark.parametrize("length", [-1, 1.5, True, None, "64"])
def test_the_memory_of_what_is_no_length_is_not_told(length: object) -> None:
    with pytest.raises(ConfigError, match="length must be a number of positions, from 0 on"):
        load_model(demo_model_path(), backend="cpu").cache_bytes(length)
