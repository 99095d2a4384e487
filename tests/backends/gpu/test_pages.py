"""Pages on the device: where keys and values lie, what is counted, what is refused."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from gpu_pages import DEVICE, new_pool
from ropewalk.backends.gpu import pages as module
from ropewalk.backends.protocol import PAGE_TOKENS


@pytest.mark.parametrize("cache_type, dtype", [("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_page_is_one_allocation_of_keys_and_values_by_instance(cache_type: str, dtype: torch.dtype) -> None:
    pool = new_pool(2, 20, cache_type)
    page = pool.take(3)
    shape = (3, 2, PAGE_TOKENS, 20)
    assert page.keys.shape == page.values.shape == shape
    assert page.keys.dtype == page.values.dtype == dtype and page.keys.device == DEVICE
    assert page.address == page.memory.data_ptr() == page.keys.data_ptr()
    instance_bytes = 2 * PAGE_TOKENS * 20 * dtype.itemsize  # of keys, and as many of values
    assert page.values.data_ptr() == page.address + instance_bytes
    assert page.keys[2].data_ptr() == page.address + 4 * instance_bytes
    assert pool.page_bytes(3) == page.memory.numel() == 6 * instance_bytes


def test_addresses_of_keys_and_values_are_multiples_of_16() -> None:
    for head_dim in (1, 8, 33, 80):
        page = new_pool(1, head_dim).take(3)
        addresses = [part[instance].data_ptr() for part in (page.keys, page.values) for instance in range(3)]
        assert not any(address % 16 for address in addresses)


def test_pages_are_counted_until_the_last_reference_is_dropped() -> None:
    pool = new_pool(2, 8)
    one, two = pool.take(1), pool.take(4)
    assert pool.used_bytes == pool.page_bytes(1) + pool.page_bytes(4)
    again = two
    del two
    gc.collect()
    assert pool.used_bytes == pool.page_bytes(1) + pool.page_bytes(4)
    del again, one
    gc.collect()
    assert pool.used_bytes == 0


def test_a_pool_gives_as_many_pages_as_its_bytes_hold() -> None:
    size = new_pool(2, 8).page_bytes(2)
    pool = new_pool(2, 8, num_bytes=3 * size + size // 2)
    held = [pool.take(2) for _ in range(3)]
    with pytest.raises(MemoryError, match=rf"a page of {size} bytes: {3 * size} of {pool.num_bytes} are in use"):
        pool.take(2)
    assert pool.used_bytes == 3 * size
    held.pop()
    gc.collect()
    assert pool.take(2).keys.shape[0] == 2


def test_a_copy_has_the_bits_of_the_page_and_memory_of_its_own() -> None:
    pool = new_pool(2, 8)
    page = pool.take(2)
    page.keys.copy_(torch.randn(page.keys.shape))
    page.values.fill_(float("nan"))
    copy = pool.copy(page)
    assert torch.equal(copy.memory, page.memory)
    assert copy.address != page.address and pool.used_bytes == 2 * pool.page_bytes(2)
    page.keys.zero_()
    assert not torch.equal(copy.keys, page.keys)


def test_a_copy_beyond_the_limit_is_refused() -> None:
    pool = new_pool(2, 8, num_bytes=new_pool(2, 8).page_bytes(2))
    page = pool.take(2)
    with pytest.raises(MemoryError, match="are in use"):
        pool.copy(page)
    assert pool.used_bytes == pool.page_bytes(2)


def test_an_allocation_that_fails_says_what_was_wanted_what_is_free_and_what_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = new_pool(2, 8)
    held = pool.take(2)

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(module, "free_bytes", lambda device: 3 << 20)
    with pytest.raises(MemoryError) as error:
        pool.take(2)
    message = str(error.value)
    assert f"a page of {pool.page_bytes(2)} bytes (8.0 KiB) could not be allocated on {DEVICE}" in message
    assert "3.0 MiB are free" in message and "pages hold 8.0 KiB of at most 1.0 GiB" in message
    assert "cache_memory" in message and "max_seq_len" in message
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert pool.used_bytes == pool.page_bytes(2) == held.memory.numel()


def test_threads_may_take_and_drop_pages_at_once() -> None:
    pool = new_pool(1, 8)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                held = [pool.take(1) for _ in range(3)]
                del held
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not failed and pool.used_bytes == 0
