"""Caches with a recent window: the right pages in float16 at every moment, and no more of them than are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from ropewalk.base.errors import CacheFullError, ConfigError, RequestError
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from variants import Variant, variants

one_of_each = pytest.mark.parametrize("variant", [Variant("reference", "exact"), *variants("int8", "cpu")[:1]], ids=str)
CPU = variants("int8", "cpu")[:1]
CONTEXT = 704


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path)
    return path


def loaded(folder: Path, variant: Variant, cache_type: str = "q4+128", **options: object) -> Model:
    return variant.load(folder, max_seq_len=CONTEXT, cache_type=cache_type, **options)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def fresh(model: Model, ids: list[int]) -> torch.Tensor:
    return model.forward(ids, model.new_cache(), "all")


def close(got: torch.Tensor, expected: torch.Tensor, variant: Variant) -> bool:
    return torch.equal(got, expected) if variant.backend == "cpu" else torch.allclose(got, expected, atol=2e-3)


@one_of_each
@pytest.mark.parametrize("cuts", [(0, 1, 400), (0, 63, 64, 65, 400), (0, 300, 301, 302, 400), (0, 128, 256, 384, 400)])
def test_the_window_is_the_same_in_any_chunks(folder: Path, variant: Variant, cuts: tuple[int, ...]) -> None:
    model, ids = loaded(folder, variant), ids_of(400)
    cache = model.new_cache()
    parts = [model.forward(ids[a:b], cache, "all") for a, b in zip(cuts, cuts[1:], strict=False)]
    small = loaded(folder, variant, max_input_len=50)
    expected = fresh(model, ids)
    assert close(torch.cat(parts), expected, variant) and close(fresh(small, ids), expected, variant)


@one_of_each
def test_recent_positions_are_read_in_float16(folder: Path, variant: Variant) -> None:
    ids = ids_of(300)
    exact, codes, both = (fresh(loaded(folder, variant, kind), ids) for kind in ("fp16", "q4", "q4+128"))
    assert close(both[:128], exact[:128], variant) and not close(codes[:128], exact[:128], variant)
    assert not close(both[200:], exact[200:], variant)
    assert (both - exact)[200:].square().mean() < (codes - exact)[200:].square().mean()


@one_of_each
def test_a_cache_is_cut_back_within_a_page_or_to_nothing(folder: Path, variant: Variant) -> None:
    model, ids = loaded(folder, variant), ids_of(500)
    cache = model.new_cache()
    for token in ids[:420]:
        model.forward([token], cache, "none")
    with pytest.raises(
        RequestError, match=r"cannot truncate to 300: a q4\+128 cache of 420 positions holds those from"
    ):
        cache.truncate(300)
    assert cache.continuable(300) == 0 and cache.length == 420
    cache.truncate(420 - 64)
    assert close(model.forward(ids[356:], cache, "all"), fresh(model, ids)[356:], variant)
    cache.truncate(0)
    assert cache.recent == {} and close(model.forward(ids[:90], cache, "all"), fresh(model, ids)[:90], variant)


def test_what_can_be_reused_is_what_the_window_allows(folder: Path) -> None:
    model, ids = loaded(folder, Variant("reference", "exact")), ids_of(400)
    cache = model.new_cache()
    model.forward(ids, cache, "none")
    assert model.reusable_prefix(cache, ids) == 399
    assert model.reusable_prefix(cache, [*ids[:200], 1, 2]) == 0


@one_of_each
def test_a_prefix_is_attached_where_a_sequence_ended(folder: Path, variant: Variant) -> None:
    model, ids = loaded(folder, variant), ids_of(600)
    first = model.new_cache()
    model.forward(ids[:330], first, "none")
    model.share(first)
    model.forward(ids[330:500], first, "none")
    model.share(first)
    del first
    expected = fresh(model, ids)
    for others, found in ((ids[:330] + ids_of(50, 1), 330), (ids[:500] + ids_of(50, 1), 500), (ids[:400], 399)):
        cache = model.new_cache()
        length = model.attach(cache, others)
        # 399: the tree holds the page of position 399, and the window before it, from the second end on
        assert length in (found, 330) and (length == found or found == 399)
        assert close(model.forward(others[length:], cache, "all"), fresh(model, others)[length:], variant)
    cache = model.new_cache()
    assert model.attach(cache, ids[:200] + ids_of(9, 1)) == 0
    assert close(model.forward(ids, cache, "all"), expected, variant)


@pytest.mark.parametrize("before", [1, 10, 40, 64])
def test_a_prompt_that_leaves_a_prefix_shortly_before_its_end_goes_on_from_there(folder: Path, before: int) -> None:
    model, ids = loaded(folder, Variant("reference", "exact")), ids_of(400)
    for end in (320, 330, 383, 384, 385):
        first = model.new_cache()
        model.forward(ids[:end], first, "none")
        model.share(first)
        assert model.attach(model.new_cache(), [*ids[: end - before], 127 - ids[end - before], 5]) == end - before
        model = loaded(folder, Variant("reference", "exact"))


@one_of_each
def test_pages_that_others_hold_are_not_written(folder: Path, variant: Variant) -> None:
    model, ids = loaded(folder, variant), ids_of(330)
    first = model.new_cache()
    model.forward(ids, first, "none")
    model.share(first)
    caches = [first, model.new_cache(), model.new_cache()]
    for cache in caches[1:]:
        assert model.attach(cache, [*ids, 1]) == 330
    tails = [ids_of(140, seed) for seed in range(3)]
    got = model.step([Span(tail, cache, "all") for tail, cache in zip(tails, caches, strict=True)])
    for tail, logits in zip(tails, got, strict=True):
        assert close(logits, fresh(model, ids + tail)[330:], variant)
    later = model.new_cache()
    assert model.attach(later, [*ids, 1]) == 330
    assert close(model.forward(tails[0], later, "all"), fresh(model, ids + tails[0])[330:], variant)


@one_of_each
def test_the_smallest_pool_holds_a_full_context(folder: Path, variant: Variant) -> None:
    with pytest.raises(ConfigError, match=r"give cache_memory=\d+ or more") as refusal:
        loaded(folder, variant, max_input_len=100, cache_memory=1000)
    memory = int(str(refusal.value).partition("cache_memory=")[2].split()[0])
    model, ids = loaded(folder, variant, max_input_len=100, cache_memory=memory), ids_of(CONTEXT)
    cache = model.new_cache()
    model.forward(ids[:-70], cache, "none")
    model.share(cache)
    for token in ids[-70:]:
        logits = model.forward([token], cache)
    assert cache.num_bytes <= model.cache_bytes(CONTEXT) < memory
    assert close(logits, fresh(loaded(folder, variant), ids)[-1:], variant)


def test_a_step_that_lacks_pages_leaves_all_as_it_was(folder: Path) -> None:
    variant = Variant("reference", "exact")
    page = loaded(folder, variant, cache_memory=1 << 24)
    memory = page.cache_bytes(CONTEXT) * 3
    model = loaded(folder, variant, max_input_len=64, cache_memory=memory)
    caches = [model.new_cache() for _ in range(4)]
    model.step([Span(ids_of(200, seed), cache, "none") for seed, cache in enumerate(caches)])
    before, used = [(cache.pages, dict(cache.recent)) for cache in caches], model.cache_used
    with pytest.raises(CacheFullError, match="span [0-3]: the cache is full"):
        model.step([Span(ids_of(480, seed), cache, "none") for seed, cache in enumerate(caches)])
    assert [(cache.pages, dict(cache.recent)) for cache in caches] == before and model.cache_used == used


@pytest.mark.skipif(not CPU, reason="needs the compiled core: what it computes is the same to the bit")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_course_of_sequences_gives_what_a_fresh_one_would(folder: Path, data: st.DataObject) -> None:
    model = loaded(folder, CPU[0], max_input_len=data.draw(st.sampled_from([40, 512])))
    expected = {seed: fresh(model, ids_of(CONTEXT, seed)) for seed in (0, 1)}
    caches = {}
    for _ in range(data.draw(st.integers(2, 8))):
        seed = data.draw(st.sampled_from([0, 1]))
        cache = caches.setdefault(seed, model.new_cache())
        match data.draw(st.sampled_from(["append", "share", "cut", "drop"])):
            case "append":
                ids = ids_of(CONTEXT, seed)
                start = model.attach(cache, ids)
                rows = data.draw(st.integers(1, 200))
                if start + rows <= CONTEXT:
                    logits = model.forward(ids[start : start + rows], cache, "all")
                    assert torch.equal(logits, expected[seed][start : start + rows])
            case "share":
                model.share(cache)
            case "cut":
                cache.truncate(cache.continuable(data.draw(st.integers(0, cache.length))))
            case "drop":
                del caches[seed]
