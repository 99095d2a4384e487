"""How much memory the pages may take: the default, what is refused at load, and what a full pool says."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from gptq_writer import model_config, write_checkpoint
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.base.errors import CacheFullError, ConfigError, RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.model import parse_model_config
from ropewalk.model import pages as pages_module
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from ropewalk.model.pages import (
    LEAST_BOUND,
    ContextPages,
    ModelLimits,
    check_cache_memory,
    choose_cache_memory,
    context_pages,
    planned_bytes,
)
from ropewalk.model.step import Span
from variants import Variant, variants

CONFIG = parse_model_config(model_config("llama"), "config.json")  # 2 layers, 2 key/value heads of 16
PAGE = 2 * 2 * 2 * 16 * 64 * 2  # bytes: keys and values, layers, heads, head size, positions, float16
GIB = 1 << 30
BACKEND = ReferenceBackend()
one_of_each = pytest.mark.parametrize(
    "variant", [Variant("reference", "exact"), *variants("exact", "cpu")[:1]], ids=str
)


def context(max_seq_len: int = 256, page_bytes: int = PAGE) -> ContextPages:
    return ContextPages(max_seq_len, CacheFormat.parse("fp16"), page_bytes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets how much memory the machine has, and how much of it is free."""

    def set_to(has: int | None, free: int | None) -> None:
        monkeypatch.setattr(pages_module, "physical_bytes", lambda: has)
        monkeypatch.setattr(pages_module, "available_bytes", lambda: free)

    return set_to


@pytest.mark.parametrize("cache_type, itemsize", [("fp16", 2), ("fp32", 4), ("q8", 34 / 16), ("fp16_q4", 25 / 16)])
@pytest.mark.parametrize("length, pages", [(1, 1), (64, 1), (65, 2), (1000, 16)])
def test_planned_bytes_are_those_of_whole_pages(cache_type: str, itemsize: int, length: int, pages: int) -> None:
    cache_format = CacheFormat.parse(cache_type)
    planned = planned_bytes(CONFIG, 3, length, cache_format)
    assert planned == context_pages(BACKEND, CONFIG, 3, ModelLimits(length, 2048, cache_format)).num_bytes
    assert planned == 2 * 3 * 2 * 16 * itemsize * 64 * pages


@pytest.mark.parametrize(
    "page_bytes, free, chosen",
    [
        (GIB, 100 * GIB, 50 * GIB),  # contexts of 4 GiB: half of what is free
        (GIB, 1000 * GIB, 64 * GIB),  # but at most 16 of them
        (GIB, 6 * GIB, 4 * GIB),  # and at least one
        (PAGE, 100 * GIB, LEAST_BOUND),  # small contexts: up to 4 GiB
        (PAGE, 4 * GIB, 2 * GIB),
        (PAGE, None, 16 * 4 * PAGE),  # the system does not say
    ],
)
def test_the_default_is_what_is_left_within_a_bound(machine, page_bytes: int, free: int | None, chosen: int) -> None:
    machine(None if free is None else 2 * free, free)
    assert choose_cache_memory(context(page_bytes=page_bytes), None, BACKEND) == chosen


def test_a_container_may_have_less_than_is_free_on_the_machine(machine) -> None:
    machine(2 * GIB, 100 * GIB)
    assert choose_cache_memory(context(), None, BACKEND) == GIB


def test_a_given_size_is_taken_as_it_is(machine) -> None:
    machine(GIB, GIB)
    for given in (4 * PAGE, 4 * PAGE + 1, GIB):
        assert choose_cache_memory(context(), given, BACKEND) == given


def test_less_than_one_context_is_refused_with_the_number_that_would_do(machine) -> None:
    machine(GIB, GIB)
    with pytest.raises(ConfigError) as caught:
        check_cache_memory(context(), 4 * PAGE - 1, BACKEND)
    for part in ("hold 192 positions of the fp16 cache", f"cache_memory={4 * PAGE} or more", "at most 192"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"hold 0 positions.*or more$"):
        check_cache_memory(context(), 1, BACKEND)


def test_more_than_the_machine_has_is_refused(machine) -> None:
    machine(GIB, GIB)
    with pytest.raises(ConfigError, match=r"cache_memory: 1073741825 bytes .* more than this machine has \(1.0 GiB\)"):
        check_cache_memory(context(), GIB + 1, BACKEND)


def test_a_context_beyond_the_machine_is_refused_with_numbers_and_remedy(machine) -> None:
    machine(256 * PAGE, 256 * PAGE)
    with pytest.raises(ConfigError, match=r"8.0 MiB \(256 bytes per position\).*has 4.0 MiB.*\(at most 16384\)"):
        check_cache_memory(context(512 * 64), None, BACKEND)
    check_cache_memory(context(256 * 64), None, BACKEND)


def test_a_context_beyond_free_memory_warns(machine, caplog: pytest.LogCaptureFixture) -> None:
    machine(GIB, 4 * PAGE)
    choose_cache_memory(context(), None, BACKEND)
    assert not caplog.records
    assert choose_cache_memory(context(257), None, BACKEND) == 5 * PAGE
    assert "257 positions takes 80.0 KiB" in caplog.text and "smaller max_seq_len" in caplog.text


def test_loading_refuses_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    monkeypatch.setattr("ropewalk.model.loader._load_weights", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="cache_memory=65536 or more"):
        load_model(tmp_path, 256, backend="reference", cache_memory=65535)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path)
    return path


def small(folder: Path, variant: Variant, contexts: int = 1) -> Model:
    """Contexts of 4 pages."""
    needed = variant.load(folder, max_seq_len=256).cache_bytes(256)
    return variant.load(folder, max_seq_len=256, cache_memory=contexts * needed)


@one_of_each
def test_a_cache_takes_pages_as_it_grows_and_gives_them_back(folder: Path, variant: Variant) -> None:
    model = small(folder, variant)
    page, cache = model.cache_bytes(1), model.new_cache()
    assert model.cache_memory == 4 * page and model.cache_used == cache.num_bytes == 0
    for added, pages in ((1, 1), (63, 1), (1, 2), (191, 4)):
        model.forward([5] * added, cache, logits="none")
        assert model.cache_used == cache.num_bytes == pages * page
    for length, pages in ((193, 4), (192, 3), (65, 2), (64, 1), (1, 1), (0, 0)):
        cache.truncate(length)
        assert model.cache_used == cache.num_bytes == pages * page
    model.forward([5] * 100, cache, logits="none")
    del cache
    gc.collect()
    assert model.cache_used == 0


@one_of_each
def test_a_full_pool_says_what_is_needed_and_what_is_free(folder: Path, variant: Variant) -> None:
    model = small(folder, variant)
    first, second = model.new_cache(), model.new_cache()
    model.forward([5] * 130, first, logits="none")
    spans = [Span([1] * 60, first), Span([2] * 65, second)]
    assert model.missing_bytes(spans) == model.cache_bytes(64)
    with pytest.raises(CacheFullError, match=r"^span 1: the cache is full.*2 sequences.*cache_memory"):
        model.step(spans)
    with pytest.raises(CacheFullError, match=r"^the cache is full.*1 sequence,"):
        model.forward([2] * 65, second)
    assert issubclass(CacheFullError, RequestError)
    assert (first.length, second.length, model.cache_used) == (130, 0, model.cache_bytes(130))
    first.truncate(64)
    assert model.missing_bytes(spans) == 0
    assert [logits.shape for logits in model.step(spans)] == [(1, 128), (1, 128)]


@one_of_each
def test_prefixes_that_nobody_uses_make_room(folder: Path, variant: Variant) -> None:
    model = small(folder, variant, contexts=2)
    prompts = [[seed] * 128 for seed in range(5)]  # two pages each, eight in all
    for prompt in prompts:
        cache = model.new_cache()
        model.forward(prompt, cache, logits="none")
        model.share(cache)
        del cache
    assert model.cache_used == model.cache_shared == model.cache_memory
    found = [model.attach(model.new_cache(), [*prompt, 7]) for prompt in prompts]
    assert found == [0, 128, 128, 128, 128]  # the one that was not used for the longest time is gone
    whole = model.new_cache()
    assert model.missing_bytes([Span([9] * 256, whole)]) == 0
    model.forward([9] * 256, whole, logits="none")
    found = [model.attach(model.new_cache(), [*prompt, 7]) for prompt in prompts]
    assert found == [0, 0, 0, 128, 128]


@one_of_each
def test_a_cache_can_always_go_on_in_a_page_that_only_the_tree_holds_too(folder: Path, variant: Variant) -> None:
    """No page is left for a copy: the tree forgets the page instead."""
    model = small(folder, variant)
    cache, ids = model.new_cache(), [(7 * i) % 128 for i in range(256)]
    model.forward(ids, cache, logits="none")
    model.share(cache)
    cache.truncate(250)
    assert model.missing_bytes([Span(ids[250:], cache)]) == 0
    model.forward(ids[250:], cache, logits="none")
    assert cache.token_ids == ids and model.cache_used == model.cache_memory


@one_of_each
def test_an_order_whose_context_does_not_fit_is_refused_and_changes_nothing(folder: Path, variant: Variant) -> None:
    model = small(folder, variant)
    with pytest.raises(ConfigError, match=r"cache_memory: .* hold 128 positions"):
        model.set_layer_order("0-1,0-1")
    assert len(model.instances) == 2
    model.forward([5] * 256, model.new_cache(), logits="none")


@one_of_each
def test_a_machine_with_less_memory_than_the_pool_leaves_caches_as_they_were(
    folder: Path, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(folder, variant)
    caches = [model.new_cache() for _ in range(2)]
    pool, taken = model.store._pool, []

    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(pool, name)

        def take(self, num_instances: int) -> object:
            if len(taken) == 1:
                raise MemoryError
            taken.append(1)
            return pool.take(num_instances)

    monkeypatch.setattr(model.store, "_pool", Failing())
    with pytest.raises(CacheFullError, match="the machine has no more memory"):
        model.step([Span([1], cache) for cache in caches])
    assert [cache.num_bytes for cache in caches] == [0, 0] and model.cache_used == 0


def test_pages_are_counted_when_threads_take_and_drop_them() -> None:
    pool = BACKEND.new_pool(2, 16, CacheFormat.parse("fp16"), 16 * PAGE)

    def work() -> None:
        for _ in range(300):
            pages = [pool.take(2) for _ in range(4)]
            del pages

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.used_bytes == 0
    held = [pool.take(2) for _ in range(16)]
    with pytest.raises(MemoryError):
        pool.take(2)
    assert pool.used_bytes == pool.num_bytes == len(held) * PAGE


@one_of_each
def test_two_caches_go_on_in_one_page_of_which_only_one_needs_a_copy(folder: Path, variant: Variant) -> None:
    model = small(folder, variant)  # four pages
    prompt, (first, second, third) = [(5 * i) % 128 for i in range(128)], (model.new_cache() for _ in range(3))
    model.forward(prompt, first, logits="none")
    model.share(first)
    assert model.attach(second, [*prompt, 7]) == 128
    model.forward([3] * 64, third, logits="none")
    first.truncate(100)
    second.truncate(100)
    spans = [Span([9, 8], first), Span([4], second)]
    assert model.missing_bytes(spans) == 0
    assert all(logits is not None for logits in model.step(spans))
    assert model.cache_used == model.cache_memory
    assert (first.token_ids, second.token_ids) == ([*prompt[:100], 9, 8], [*prompt[:100], 4])
    fresh = small(folder, variant)
    cache = fresh.new_cache()
    expected = fresh.forward([*prompt[:100], 9, 8, 1], cache)
    third.truncate(0)
    torch.testing.assert_close(model.forward([1], first), expected, atol=1e-5, rtol=0)


def test_a_large_full_tree_makes_room_for_several_pages_at_once(folder: Path) -> None:
    """Each look for the oldest prefixes visits all of them; with one for each page, a full pool slowed every step."""
    model = small(folder, Variant("reference", "exact"), contexts=32)  # 128 pages
    for seed in range(64):
        cache = model.new_cache()
        model.forward([seed + 1] * 128, cache, logits="none")
        model.share(cache)
        del cache
    assert model.cache_used == model.cache_memory
    model.forward([99], model.new_cache(), logits="none")
    gc.collect()
    assert model.cache_used == model.cache_memory - 4 * model.cache_bytes(1)
    kept = [model.attach(model.new_cache(), [*[seed + 1] * 128, 7]) for seed in range(64)]
    assert kept == [0, 0, *[128] * 62]


def test_what_is_missing_is_asked_for_spans(folder: Path) -> None:
    model = small(folder, Variant("reference", "exact"))
    with pytest.raises(RequestError, match="a step takes ropewalk.Span, got int"):
        model.missing_bytes([3])
