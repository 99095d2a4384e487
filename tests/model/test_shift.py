"""Positions taken out of a cache, and prompts recognised that lack a stretch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from ropewalk.base.errors import CacheFullError, RequestError
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model
from ropewalk.model.shift import Removed, common, find_removed
from variants import Variant, variants

VOCAB = 128
EXACT = Variant("cpu", "exact")
tokens = st.lists(st.integers(0, 2), max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, {"max_position_embeddings": 512}, desc_act=True)
    return path


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one_layer")
    write_checkpoint(path, {"max_position_embeddings": 512, "num_hidden_layers": 1})
    return path


def loaded(folder: Path, variant: Variant = EXACT, **options: Any) -> Model:
    return variant.load(folder, **{"max_seq_len": 384, "cache_type": "fp32", **options})


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def read(model: Model, ids: list[int]) -> KvCache:
    cache = model.new_cache()
    model.forward(ids, cache, "none")
    return cache


@pytest.mark.parametrize("variant", variants("exact"), ids=str)
@pytest.mark.parametrize("keep, drop", [(4, 64), (70, 30), (0, 1), (64, 64), (1, 148), (149, 1), (63, 66)])
def test_shifting_one_layer_is_reading_the_rest_anew_up_to_rounding(one_layer, variant, keep, drop) -> None:
    model, ids = loaded(one_layer, variant), ids_of(150)
    cache = read(model, ids)
    assert model.shift(cache, keep, drop) == 150 - keep - drop
    rest = ids[:keep] + ids[keep + drop :]
    assert cache.token_ids == rest
    fresh = read(model, rest) if rest else model.new_cache()
    torch.testing.assert_close(model.forward([5, 6], cache, "all"), model.forward([5, 6], fresh, "all"), **CLOSE)


CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.parametrize("kind", ["q8", "q4+64", "q8_q4+128", "fp16"])
def test_every_format_can_be_shifted_and_goes_on_alike_in_any_chunking(folder: Path, kind: str) -> None:
    ids, results = ids_of(300), []
    for chunk in (7, 64, 2048):
        model = loaded(folder, cache_type=kind, max_input_len=chunk)
        cache = read(model, ids)
        model.shift(cache, 20, 77)
        results.append(model.forward(ids_of(50, 1), cache, "all"))
        assert cache.length == 300 - 77 + 50
    assert all(torch.equal(result, results[0]) for result in results)
    fresh = model.forward(ids_of(50, 1), read(model, ids[:20] + ids[97:]), "all")
    assert torch.allclose(results[0], fresh, atol=2.0) and not torch.equal(results[0], fresh)


def test_a_recent_window_that_would_reach_over_the_kept_start_is_refused(folder: Path) -> None:
    model = loaded(folder, cache_type="q4+128")
    cache = read(model, ids_of(300))
    with pytest.raises(RequestError, match="128 recent positions .* would begin before 100"):
        model.shift(cache, 100, 150)
    assert cache.length == 300 and model.shift(cache, 100, 64) == 136


def test_a_shifted_cache_is_nobody_elses_prefix(folder: Path) -> None:
    model, ids = loaded(folder), ids_of(200)
    cache = read(model, ids)
    model.shift(cache, 64, 70)
    rest = ids[:64] + ids[134:]
    assert model.reusable_prefix(cache, [*rest, 1]) == 64
    model.share(cache)
    assert model.attach(model.new_cache(), [*rest, 1]) == 64
    other = read(model, rest)
    model.shift(other, 10, 0)  # nothing
    assert model.reusable_prefix(other, [*rest, 1]) == len(rest)


def test_shared_pages_are_left_alone(folder: Path) -> None:
    model, ids = loaded(folder), ids_of(200)
    cache = read(model, ids)
    model.share(cache)
    other = model.new_cache()
    model.attach(other, [*ids, 1])
    before = [part.clone() for held in other.pages for part in model.store._pool.parts_of(held.page)]
    model.shift(cache, 70, 40)
    after = [part for held in other.pages for part in model.store._pool.parts_of(held.page)]
    assert all(map(torch.equal, before, after)) and model.attach(model.new_cache(), [*ids, 1]) == 200
    assert cache.pages[0] is other.pages[0]  # before the stretch they still share


def test_without_memory_for_copies_the_tree_forgets_or_nothing_changes(folder: Path) -> None:
    page = loaded(folder).cache_bytes(64)
    model = loaded(folder, cache_memory=6 * page)
    cache = read(model, ids_of(380))
    model.share(cache)
    assert model.shift(cache, 70, 64) == 246 and model.cache_used == 5 * page
    cache.truncate(256)
    first, second = read(model, ids_of(64, 1)), model.new_cache()
    model.share(first)
    assert model.attach(second, [*ids_of(64, 1), 1]) == 64
    last = read(model, ids_of(10, 2))
    assert model.cache_used == 6 * page and last.length == 10
    with pytest.raises(CacheFullError, match="to be shifted are shared with other sequences"):
        model.shift(second, 4, 30)
    assert second.token_ids == first.token_ids == ids_of(64, 1) and second.pages == first.pages


@pytest.mark.parametrize("keep, drop, message", [(-1, 2, "keep must be"), (0, 1.5, "drop must be"), (10, 11, "20 pos")])
def test_what_a_cache_does_not_hold_cannot_be_taken_out(folder: Path, keep, drop, message) -> None:
    model = loaded(folder)
    cache = read(model, ids_of(20))
    with pytest.raises(RequestError, match=message):
        model.shift(cache, keep, drop)
    assert cache.length == 20


def test_an_interrupted_shift_keeps_what_it_has_not_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = loaded(folder), ids_of(150)
    cache = read(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.backend), "move_rows_", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.shift(cache, 70, 40)
    assert cache.token_ids == ids[:70]
    assert torch.equal(model.forward([5], cache), model.forward([5], read(model, ids[:70])))


@given(old=tokens, keep=st.integers(0, 30), drop=st.integers(1, 30), more=tokens)
def test_a_prompt_without_a_stretch_is_recognised(old: list[int], keep: int, drop: int, more: list[int]) -> None:
    """What is found holds, and is worth as much as the stretch that was really taken out."""
    new = old[:keep] + old[keep + drop :] + more
    plain, found = common(new, old), find_removed(new, old)
    if found is not None:
        end = found.keep + found.drop + found.rest
        assert found.keep == plain and found.drop >= 1 and found.rest >= 1 and end <= len(old)
        assert new[: found.keep + found.rest] == old[: found.keep] + old[found.keep + found.drop : end]
    worth = plain if found is None else found.keep + found.rest
    assert worth >= len(old[:keep] + old[keep + drop :])


@given(old=tokens, new=tokens)
def test_no_stretch_gives_more_than_the_one_that_is_found(old: list[int], new: list[int]) -> None:
    found = find_removed(new, old)
    best = max(
        (
            keep + common(new[keep:], old[keep + drop :])
            for keep in range(common(new, old) + 1)
            for drop in range(len(old) - keep + 1)
        ),
        default=0,
    )
    assert (common(new, old) if found is None else found.keep + found.rest) == best


def test_the_shortest_of_equal_stretches_is_taken() -> None:
    assert find_removed([1, 9, 7, 7], [1, 2, 9, 7, 3, 9, 7]) == Removed(1, 1, 2)
    assert find_removed([1, 2, 3], [1, 2, 3]) is find_removed([], [1]) is find_removed([1], []) is None


def kept_chat(model: Model, ids: list[int], client: object = "ann") -> None:
    model.keep(read(model, ids), client)


def test_a_kept_cache_is_shifted_for_a_prompt_of_its_client(folder: Path) -> None:
    model, ids = loaded(folder), ids_of(300)
    new = ids[:20] + ids[120:] + [7, 8, 9]
    kept_chat(model, ids)
    cache = model.new_cache()
    assert model.resume(cache, new, client="bob", shifts=True) == 0 and cache.length == 0
    assert model.resume(cache, new, client="ann") == 0 and cache.length == 0
    assert model.resume(cache, new, client="ann", shifts=True) == 180
    assert cache.token_ids == new[:200]
    expected = read(model, ids)
    model.shift(expected, 20, 100)
    assert torch.equal(model.forward([7], cache), model.forward([7], expected))
    assert model.resume(model.new_cache(), new, client="ann", shifts=True) == 0  # it has gone to who asked first


def test_only_a_moved_cache_is_resumed_without_shifting_and_only_with_its_adapters_and_rope(folder: Path) -> None:
    model, ids = loaded(folder), ids_of(200)
    kept_chat(model, ids)
    assert model.resume(model.new_cache(), [*ids, 1], client="ann") == 0
    model.rescale({"rope_type": "linear", "factor": 2.0})
    cache = model.new_cache()
    model.resume(cache, [*ids, 1], client="ann")
    assert cache.length == 200 and cache.was_moved
    model.keep(cache, "ann")
    model.rescale({"rope_type": "linear", "factor": 4.0}, caches=[])
    other = model.new_cache()
    model.resume(other, [*ids, 1], client="ann")
    assert other.length == 0


def test_kept_caches_make_room(folder: Path) -> None:
    page = loaded(folder).cache_bytes(64)
    model = loaded(folder, cache_memory=6 * page)
    kept_chat(model, ids_of(150))
    kept_chat(model, ids_of(150, 1))
    assert model.cache_used == model.cache_shared == 6 * page
    assert len(list(model.store.kept)) == 2
    read(model, ids_of(190, 2))
    assert len(list(model.store.kept)) == 1
    longer = ids_of(150, 1) + [1] * 20
    model.keep(read(model, longer), "ann")  # the one that it continues goes
    assert [cache.token_ids for cache in model.store.kept] == [longer]


def test_many_shifts_in_a_row_leave_the_tokens_that_they_leave(folder: Path) -> None:
    model = loaded(folder)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4))
    def check(cuts: list[tuple[float, float]]) -> None:
        ids = ids_of(150)
        cache = read(model, ids)
        for first, part in cuts:
            keep = int(first * len(ids))
            drop = int(part * (len(ids) - keep))
            assert model.shift(cache, keep, drop) == (len(ids) - keep - drop if drop else 0)
            del ids[keep : keep + drop]
            assert cache.token_ids == ids and sum(end - start for start, end, _ in cache.segments) == len(ids)

    check()
