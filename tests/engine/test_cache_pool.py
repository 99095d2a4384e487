"""engine/cache_pool.py: which cache a request gets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fake_model import FakeCache, FakeModel
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.engine.cache_pool import CachePool


def use(pool: CachePool, ids: Sequence[int]) -> FakeCache:
    """Run a prompt as generation does: keep the usable prefix, append the rest."""
    with pool.lend(ids, None) as cache:
        cache.truncate(FakeModel().reusable_prefix(cache, ids))
        cache.token_ids += ids[cache.length :]
    return cache


A, B, C = list(range(1, 21)), [1, *range(30, 50)], [1, *range(50, 60)]


def test_conversations_that_take_turns_keep_their_caches() -> None:
    pool = CachePool(FakeModel(), 2)
    first, second = use(pool, A), use(pool, B)
    assert first is not second
    for number in range(3):
        A_longer, B_longer = A + [60 + number], B + [60 + number]
        assert use(pool, A_longer) is first and use(pool, B_longer) is second


def test_a_shared_beginning_does_not_let_a_new_conversation_overwrite_a_long_one() -> None:
    pool = CachePool(FakeModel(), 3)
    first = use(pool, A)
    assert use(pool, A[:3] + [63]) is not first
    assert use(pool, A + [60]) is first


def test_without_a_usable_prefix_the_longest_unused_cache_is_taken() -> None:
    pool = CachePool(FakeModel(), 2)
    first, second = use(pool, A), use(pool, B)
    assert use(pool, A + [60]) is first
    assert use(pool, C) is second


def test_of_several_usable_prefixes_the_longest_is_taken() -> None:
    pool = CachePool(FakeModel(), 2)
    with pool.lend(A, None) as short, pool.lend(A, None) as long:
        short.token_ids, long.token_ids = A[:5], A[:9]
    assert use(pool, A) is long


def test_a_cache_is_lent_to_one_at_a_time_and_comes_back_after_an_error() -> None:
    pool = CachePool(FakeModel(), 1)
    with pytest.raises(ZeroDivisionError), pool.lend(A, None):
        with pytest.raises(RequestError, match="a ticket allows one stream at a time"), pool.lend(B, None):
            pass
        raise ZeroDivisionError
    with pool.lend(A, None):
        pass


def test_caches_that_the_model_does_not_accept_any_more_are_made_anew() -> None:
    model = FakeModel()
    pool = CachePool(model, 2)
    old = use(pool, A)
    model.accepts = lambda cache: cache is not old
    with pool.lend(A, None) as one, pool.lend(A, None) as two:
        assert old is not one and old is not two
        assert one.capacity == two.capacity == pool.capacity


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_an_invalid_number_of_caches_is_refused(number) -> None:
    with pytest.raises(ConfigError, match="num_caches must be a positive integer, got"):
        CachePool(FakeModel(), number)
