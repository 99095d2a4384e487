"""Shared prefixes: found again under the same adapters, frequencies and layer order, never written, and forgotten."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.base.errors import CacheFullError, RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from variants import Variant, variants


class Owner:
    """Stands for a model."""


one_of_each = pytest.mark.parametrize(
    "variant", [Variant("reference", "exact"), *variants("exact", "cpu")[:1]], ids=str
)
PAGES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path)
    write_adapter(path / "storm", path, exact, 1)
    return path


@pytest.fixture(scope="module")
def dynamic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frequencies depend on the length from 100 positions on."""
    path = tmp_path_factory.mktemp("dynamic")
    write_checkpoint(path, {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 100})
    return path


def loaded(folder: Path, variant: Variant, max_seq_len: int = 256, **options: Any) -> Model:
    """Room for 12 pages: three contexts."""
    page = variant.load(folder, max_seq_len=64, cache_type="fp32").cache_bytes(64)
    return variant.load(folder, max_seq_len=max_seq_len, cache_type="fp32", cache_memory=PAGES * page, **options)


@pytest.fixture
def model(folder: Path) -> Model:
    found = loaded(folder, Variant("reference", "exact"))
    found.load_adapter(folder / "storm", "storm")
    return found


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def shared(model: Model, ids: list[int], **options: Any) -> KvCache:
    """A cache of these tokens whose prefix has been put in the tree."""
    cache = model.new_cache()
    model.forward(ids, cache, "none", **options)
    model.share(cache)
    return cache


def attached(model: Model, ids: list[int], **options: Any) -> int:
    return model.attach(model.new_cache(), ids, **options)


def close(got: torch.Tensor, expected: torch.Tensor, variant: Variant) -> bool:
    return torch.equal(got, expected) if variant.backend == "cpu" else torch.allclose(got, expected, atol=1e-4)


@one_of_each
@pytest.mark.parametrize("asked", [1, 2, 63, 64, 65, 100, 128, 129, 150, 200, 201, 250])
def test_a_prompt_keeps_what_another_has_computed_except_its_last_token(
    folder: Path, variant: Variant, asked: int
) -> None:
    model, ids = loaded(folder, variant), ids_of(250)
    shared(model, ids[:200])
    cache = model.new_cache()
    assert model.attach(cache, ids[:asked]) == cache.length == min(200, asked - 1)
    assert cache.token_ids == ids[: cache.length]
    got = model.forward(ids[cache.length : asked], cache)
    assert close(got, model.forward(ids[:asked], model.new_cache()), variant)


@one_of_each
@pytest.mark.parametrize("differs_at", [0, 1, 63, 64, 100, 150])
def test_a_prompt_that_takes_another_turn_keeps_what_comes_before(
    folder: Path, variant: Variant, differs_at: int
) -> None:
    model, ids = loaded(folder, variant), ids_of(180)
    shared(model, ids)
    turned = [*ids[:differs_at], (ids[differs_at] + 1) % 128, *ids_of(20, 5)]
    cache = model.new_cache()
    assert model.attach(cache, turned) == differs_at
    got = model.forward(turned[cache.length :], cache)
    assert close(got, model.forward(turned, model.new_cache()), variant)
    assert attached(model, [*ids, 1]) == 180  # and the first is as it was


@one_of_each
@pytest.mark.parametrize("held", [0, 10, 64, 70, 128])
def test_a_cache_that_holds_a_part_already_is_extended(folder: Path, variant: Variant, held: int) -> None:
    model, ids = loaded(folder, variant), ids_of(180)
    shared(model, ids[:150])
    cache = model.new_cache()
    if held:
        model.forward(ids[:held], cache, "none")
    assert model.attach(cache, ids) == 150
    assert close(model.forward(ids[150:], cache), model.forward(ids, model.new_cache()), variant)


def test_full_pages_are_shared_and_the_rest_is_copied(model: Model) -> None:
    page, ids = model.cache_bytes(1), ids_of(150)
    first = shared(model, ids)  # three pages, and a copy of the last for the tree
    assert (model.cache_used, model.cache_shared) == (4 * page, page)
    second = model.new_cache()
    model.attach(second, [*ids, 1])
    assert model.cache_used == 5 * page and [a is b for a, b in zip(first.pages, second.pages, strict=True)] == [
        True,
        True,
        False,
    ]
    del first, second
    gc.collect()
    assert model.cache_used == model.cache_shared == 3 * page


def test_what_is_shared_is_never_written(model: Model) -> None:
    """Two caches go on differently inside a page that both have: each writes to a copy of its own."""
    ids = ids_of(128)
    first, second = shared(model, ids), model.new_cache()
    model.attach(second, [*ids, 1])
    before = [page.page.memory.clone() for page in first.pages]
    for cache, token_id in ((first, 1), (second, 2)):
        cache.truncate(100)
        model.forward([token_id] * 28, cache, "none")
    assert attached(model, [*ids, 1]) == 128
    third = model.new_cache()
    model.attach(third, [*ids, 1])
    assert all(torch.equal(page.page.memory, memory) for page, memory in zip(third.pages, before, strict=True))
    assert first.pages[0] is second.pages[0] is third.pages[0]
    assert len({id(cache.pages[1]) for cache in (first, second, third)}) == 3


def test_a_page_that_nobody_shares_is_written_where_it_is(model: Model) -> None:
    cache = model.new_cache()
    model.forward(ids_of(100), cache, "none")
    held = cache.pages
    cache.truncate(80)
    model.forward([1] * 20, cache, "none")
    assert cache.pages == held


def test_the_same_prefix_is_kept_once(model: Model) -> None:
    ids = ids_of(150)
    for length in (150, 150, 100, 140, 130):
        shared(model, ids[:length])
    gc.collect()
    assert model.cache_used == model.cache_shared == model.cache_bytes(150)
    shared(model, ids_of(190)[:150] + [1] * 40)  # more of the third page: the part of it that was kept goes
    gc.collect()
    assert model.cache_used == model.cache_shared == model.cache_bytes(190)


def test_only_what_was_computed_in_the_same_way_is_reused(model: Model, folder: Path) -> None:
    ids = ids_of(150)
    shared(model, ids, adapters="storm")
    wanted = {None: 0, "storm": 149, "storm:0.5": 0, "storm:0": 0}
    assert {adapters: attached(model, ids, adapters=adapters) for adapters in wanted} == wanted
    model.unload_adapter("storm")
    model.load_adapter(folder / "storm", "storm")
    assert attached(model, ids, adapters="storm") == 0  # another adapter, for all that anybody knows


def test_pages_of_another_layer_order_wait_for_their_own(model: Model) -> None:
    ids = ids_of(100)
    shared(model, ids)
    model.set_layer_order("0,0")
    assert attached(model, ids) == 0
    shared(model, ids)
    assert attached(model, ids) == 99
    model.set_layer_order("0-1")
    assert attached(model, ids) == 99


def test_frequencies_decide_what_is_reused(dynamic_folder: Path) -> None:
    model, ids = loaded(dynamic_folder, Variant("reference", "exact")), ids_of(150)
    shared(model, ids[:90])
    found = {length: attached(model, ids[:length]) for length in (80, 100, 101, 150)}
    assert found == {80: 79, 100: 90, 101: 0, 150: 0}
    shared(model, ids[:90], seq_len=150)
    assert (
        attached(model, ids[:101]) == 0 and attached(model, ids[:150]) == attached(model, ids[:101], seq_len=150) == 90
    )
    cache = model.new_cache()
    model.forward(ids[:10], cache, "none")
    assert model.attach(cache, ids) == 10  # computed for another length: it stays as it is


def test_a_cache_whose_keys_were_turned_is_shared_no_more(dynamic_folder: Path) -> None:
    model, ids, cache = loaded(dynamic_folder, Variant("reference", "exact")), ids_of(150), None
    cache = model.new_cache()
    model.forward(ids[:70], cache, "none")
    model.share(cache)
    model.forward(ids[70:], cache, "none")  # beyond 100 positions the frequencies follow the length
    model.share(cache)
    assert attached(model, ids[:90]) == 70
    assert attached(model, ids) == 0


def test_an_empty_cache_shares_nothing(model: Model) -> None:
    model.share(model.new_cache())
    assert model.cache_used == 0


def test_attaching_is_refused_where_forward_would_refuse(model: Model) -> None:
    cache = model.new_cache()
    model.forward([1, 2, 3], cache, "none")
    for ids, message in (
        ([1, 2, 4, 5], "holds 3 tokens that are not the first of the 4"),
        ([1, 2], "not the first of"),
    ):
        with pytest.raises(RequestError, match=message):
            model.attach(cache, ids)
    with pytest.raises(RequestError, match="token id 128 at position 0"):
        model.attach(cache, [128])
    with pytest.raises(RequestError, match="another model"):
        model.attach(KvCache(Owner(), threading.RLock(), CacheFormat.parse("fp16"), 9), [1])
    with pytest.raises(RequestError, match="new_cache.*got dict"):
        model.share({})
    with pytest.raises(RequestError, match="no adapter 'gone'"):
        model.attach(cache, [1, 2, 3, 4], adapters="gone")
    with pytest.raises(RequestError, match="seq_len must be"):
        model.attach(cache, [1, 2, 3, 4], seq_len=-1)
    assert cache.token_ids == [1, 2, 3]


def test_a_small_cache_is_extended_no_further_than_its_capacity(model: Model) -> None:
    shared(model, ids_of(100))
    cache = model.new_cache(70)
    assert model.attach(cache, ids_of(100)) == 70 == cache.capacity


def test_without_memory_for_a_copy_full_pages_are_shared_all_the_same(model: Model) -> None:
    ids = ids_of(150)
    caches = [shared(model, ids)]
    caches += [model.new_cache() for _ in range(2)]
    for cache, length in zip(caches[1:], (256, 256), strict=True):
        model.forward([5] * length, cache, "none")
    assert model.cache_used == PAGES * model.cache_bytes(1)
    assert attached(model, [*ids, 1]) == 128  # the tree's third page is of use just now, so it stays
    assert attached(model, [*ids[:70], 1]) == 70  # and is not any more: it makes room for a copy of the second


def test_the_memory_of_a_dropped_model_is_free_at_once(folder: Path) -> None:
    model = loaded(folder, Variant("reference", "exact"))
    shared(model, ids_of(200))
    pool = model.store._pool
    assert pool.used_bytes > 0
    gc.collect()
    gc.disable()
    try:
        del model
        assert pool.used_bytes == 0
    finally:
        gc.enable()


@one_of_each
def test_any_history_of_sharing_gives_the_logits_of_a_fresh_run(folder: Path, variant: Variant) -> None:
    """Caches of few different prompts are grown, cut, shared, dropped and attached, in a pool that is often full."""
    model, fresh = loaded(folder, variant), variant.load(folder, max_seq_len=256, cache_type="fp32")
    prompts = [ids_of(256), [*ids_of(90), *ids_of(166, 1)], [*ids_of(64), *ids_of(192, 2)], ids_of(256, 3)]
    expected: dict[tuple[int, int], torch.Tensor] = {}

    def logits_of(prompt: int, length: int) -> torch.Tensor:
        if (prompt, length) not in expected:
            expected[prompt, length] = fresh.forward(prompts[prompt][:length], fresh.new_cache())
        return expected[prompt, length]

    lengths = st.sampled_from([1, 5, 63, 64, 65, 90, 100, 127, 128, 129, 150, 192, 255])
    action = st.tuples(
        st.sampled_from(["grow", "cut", "share", "drop", "attach"]), st.integers(0, 4), st.integers(0, 3), lengths
    )

    def act(caches: dict[int, tuple[int, KvCache]], what: str, slot: int, prompt: int, length: int) -> None:
        prompt, cache = caches.setdefault(slot, (prompt, model.new_cache()))
        ids = prompts[prompt]
        if what == "drop":
            del caches[slot]
        elif what == "share":
            model.share(cache)
        elif what == "cut":
            cache.truncate(min(length, cache.length))
        elif length > cache.length:
            if what == "attach":
                model.attach(cache, ids[:length])
            span, before = Span(ids[cache.length : length], cache), (cache.length, cache.pages)
            missing = model.missing_bytes([span])
            try:
                (got,) = model.step([span])
            except CacheFullError:
                assert missing > 0 and before == (cache.length, cache.pages)
            else:
                assert missing == 0 and close(got, logits_of(prompt, length), variant)
        assert cache.token_ids == ids[: cache.length]
        assert cache.num_bytes == model.cache_bytes(cache.length)

    @settings(max_examples=40, deadline=None)
    @given(actions=st.lists(action, min_size=1, max_size=25))
    def check(actions: list[tuple[str, int, int, int]]) -> None:
        caches: dict[int, tuple[int, KvCache]] = {}
        for one in actions:
            act(caches, *one)
            held = {id(page): page.num_bytes for _, cache in caches.values() for page in cache.pages}
            assert model.cache_used == sum(held.values()) + model.cache_shared <= model.cache_memory
        caches.clear()
        assert model.cache_used == model.cache_shared
        model.store._tree.evict(model.cache_memory)
        assert model.cache_used == model.cache_shared == 0

    check()


def test_prefixes_are_shared_and_attached_while_another_thread_computes(model: Model) -> None:
    ids, failures, done = ids_of(150), [], threading.Event()

    def share_and_attach() -> None:
        try:
            while not done.is_set():
                cache = model.new_cache()
                length = model.attach(cache, ids)
                model.share(cache)
                cache.truncate(length // 2)
                assert model.missing_bytes([]) == 0 and model.cache_shared >= 0
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=share_and_attach) for _ in range(3)]
    for thread in threads:
        thread.start()
    expected = model.forward(ids, model.new_cache())
    for _ in range(15):
        cache = model.new_cache()
        model.attach(cache, ids)
        assert torch.allclose(model.forward(ids[cache.length :], cache), expected, atol=1e-4)
        model.share(cache)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    del cache
    gc.collect()
    assert model.cache_used == model.cache_shared
