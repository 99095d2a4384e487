"""Counting positions, comparing prefixes, refusing what memory cannot hold."""

from __future__ import annotations

import pytest
import torch

from gptq_writer import model_config
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.config.model import parse_model_config
from ropewalk.model import cache as cache_module
from ropewalk.model.cache import Frequencies, KvCache, Origin, cache_bytes, new_stores

SHORT, LONG = Origin(Frequencies(b"short", 1.0)), Origin(Frequencies(b"long", 1.0))
CONFIG = parse_model_config(model_config("llama"), "config.json")  # 2 layers, 2 key/value heads of 16


def filled(*spans: tuple[list[int], Origin]) -> KvCache:
    cache = KvCache(object(), [], 100)
    for token_ids, origin in spans:
        cache.record_(token_ids, origin)
    return cache


def test_length_and_token_ids_follow_what_is_recorded_and_truncated() -> None:
    cache = filled(([5, 6, 7], SHORT), ([8], SHORT))
    assert (cache.length, cache.token_ids) == (4, [5, 6, 7, 8])
    cache.truncate(2)
    assert (cache.length, cache.token_ids) == (2, [5, 6])
    cache.truncate(0)
    assert cache.token_ids == []


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
    cache.record_([9], SHORT)
    assert cache.common_prefix([5, 6, 9], SHORT) == 3


def test_truncation_inside_a_span_keeps_its_origin() -> None:
    cache = filled(([5, 6], SHORT), ([7, 8], LONG))
    cache.truncate(3)
    cache.record_([9], SHORT)
    assert cache.common_prefix([5, 6, 7, 9], SHORT) == 2


@pytest.mark.parametrize("cache_type, itemsize", [("fp16", 2), ("fp32", 4)])
def test_planned_bytes_are_those_allocated(cache_type: str, itemsize: int) -> None:
    stores = new_stores(ReferenceBackend(), CONFIG, 3, 50, cache_type)
    cache = KvCache(object(), stores, 50)
    assert cache.num_bytes == cache_bytes(CONFIG, 3, 50, cache_type) == 2 * 3 * 2 * 16 * 50 * itemsize
    assert all(store.capacity == 50 for store in stores)


def test_a_cache_beyond_the_machine_is_refused_with_numbers_and_remedy() -> None:
    capacity = 1 << 40  # 256 bytes per position: 256 TiB
    with pytest.raises(ConfigError, match=r"256\.0 TiB.*256 bytes per position.*smaller max_seq_len \(at most \d+\)"):
        new_stores(ReferenceBackend(), CONFIG, 2, capacity, "fp16")


def test_a_cache_beyond_free_memory_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cache_module, "available_bytes", lambda: 2559)
    new_stores(ReferenceBackend(), CONFIG, 2, 9, "fp16")
    assert not caplog.records
    new_stores(ReferenceBackend(), CONFIG, 2, 10, "fp16")
    assert "10 positions takes 2.5 KiB" in caplog.text and "smaller max_seq_len" in caplog.text


def test_a_failed_allocation_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullBackend:
        device = torch.device("cpu")

        def new_kv(self, *args: object) -> None:
            raise MemoryError

    monkeypatch.setattr(cache_module, "physical_bytes", lambda: None)
    with pytest.raises(ConfigError, match="2.5 KiB.*could not be allocated"):
        new_stores(FullBackend(), CONFIG, 2, 10, "fp16")
