"""Another RoPE for a model whose caches are in use: turned, or computed anew; and keys that outgrow their length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.base.errors import CacheFullError, ConfigError, RequestError
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model
from ropewalk.model.step import Span
from variants import Variant, variants

VOCAB = 128
NONE = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}  # scales keys, too
NTK = {"rope_type": "ntk", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
SCALINGS = (NONE, LINEAR, YARN, NTK, DYNAMIC)
every_variant = pytest.mark.parametrize("variant", variants(), ids=str)
every_exact_variant = pytest.mark.parametrize("variant", variants("exact"), ids=str)
EXACT = Variant("cpu", "exact")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(path, {"max_position_embeddings": 64}, family="qwen2", desc_act=True, sym=False)
    write_adapter(path / "storm", path, exact, 1)
    return path


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one_layer")
    write_checkpoint(path, {"max_position_embeddings": 64, "num_hidden_layers": 1})
    return path


def loaded(folder: Path, variant: Variant = EXACT, **options: Any) -> Model:
    return variant.load(folder, **{"max_seq_len": 256, "cache_type": "fp32", **options})


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def read(model: Model, length: int = 150, seed: int = 0, **options: Any) -> KvCache:
    cache = model.new_cache()
    model.forward(ids_of(length, seed), cache, "none", **options)
    return cache


def bytes_of(cache: KvCache) -> list[torch.Tensor]:
    """The memory of all pages, as it is."""
    parts_of = cache.owner.store._pool.parts_of
    return [part.clone() for held in cache.pages for part in parts_of(held.page)]


def unchanged(cache: KvCache, before: list[torch.Tensor]) -> bool:
    after = bytes_of(cache)
    return len(after) == len(before) and all(map(torch.equal, after, before))


@every_variant
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_recomputed_caches_have_the_bits_of_a_model_that_was_loaded_like_this(folder, variant, scaling) -> None:
    model, fresh = loaded(folder, variant), loaded(folder, variant, rope_scaling=scaling)
    caches = [read(model, 150), read(model, 65, seed=1), model.new_cache()]
    model.rescale(scaling, "recompute")
    assert not any(cache.was_moved for cache in caches)
    for cache, length, seed in ((caches[0], 150, 0), (caches[1], 65, 1), (caches[2], 0, 0)):
        other = read(fresh, length, seed) if length else fresh.new_cache()
        assert cache.token_ids == other.token_ids and cache.segments == other.segments
        if variant.backend == "cpu":
            assert torch.equal(model.forward([5, 6], cache, "all"), fresh.forward([5, 6], other, "all"))
        else:
            assert torch.allclose(model.forward([5], cache), fresh.forward([5], other), atol=0.05)


@every_exact_variant
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_turning_the_keys_of_one_layer_is_computing_them_anew_up_to_rounding(one_layer, variant, scaling) -> None:
    model, fresh = loaded(one_layer, variant), loaded(one_layer, variant, rope_scaling=scaling)
    cache = read(model, 150)
    model.rescale(scaling, "rotate")
    got, expected = model.forward([5, 6], cache, "all"), fresh.forward([5, 6], read(fresh, 150, seq_len=152), "all")
    if scaling is not DYNAMIC:  # there the fresh one has the frequencies of its own length
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    back = loaded(one_layer, variant)
    model.rescale(NONE, "rotate")
    cache.truncate(150)
    torch.testing.assert_close(model.forward([5], cache), back.forward([5], read(back, 150)), atol=1e-4, rtol=1e-4)


def test_turned_keys_of_deeper_layers_still_know_of_the_old_rope(folder: Path) -> None:
    model, fresh = loaded(folder), loaded(folder, rope_scaling=YARN)
    cache = read(model)
    model.rescale(YARN)
    got, expected = model.forward([5], cache), fresh.forward([5], read(fresh))
    assert not torch.allclose(got, expected, atol=1e-4) and torch.allclose(got, expected, atol=1.0)


@pytest.mark.parametrize("mode", ["rotate", "recompute"])
def test_caches_that_are_not_given_stay_as_they_are_and_are_refused(folder: Path, mode: str) -> None:
    model = loaded(folder)
    mine, other, empty = read(model), read(model, seed=1), model.new_cache()
    before = bytes_of(other)
    model.rescale(LINEAR, mode, caches=[mine])
    assert model.accepts(mine) and not model.accepts(other) and model.accepts(empty)
    for call in (
        lambda: model.forward([5], other),
        lambda: model.step([Span([5], other)]),
        lambda: model.attach(other, ids_of(200, 1)),
        lambda: model.share(other),
        lambda: model.shift(other, 4, 4),
        lambda: model.reusable_prefix(other, [5]),
    ):
        with pytest.raises(RequestError, match=r"rotated by another RoPE \(.*bring it along with rescale"):
            call()
    assert unchanged(other, before)
    model.forward([5], empty)
    model.rescale(LINEAR, mode, caches=[other])
    again = loaded(folder)
    expected = read(again, seed=1)
    again.rescale(LINEAR, mode)
    assert torch.equal(model.forward([5], other), again.forward([5], expected))
    third = read(loaded(folder))
    with pytest.raises(RequestError, match="belongs to another model"):
        model.rescale(NONE, mode, caches=[third])
    other_rope = read(model, 10)
    model.rescale(NONE, mode, caches=())
    other_rope.truncate(0)  # what is empty was rotated by nothing
    assert model.forward([5], other_rope) is not None


def test_a_prefix_that_was_shared_under_another_rope_is_not_found(folder: Path) -> None:
    model = loaded(folder)
    cache = read(model, 150)
    model.share(cache)
    model.rescale(LINEAR, "rotate")
    assert model.attach(model.new_cache(), ids_of(150)) == 0
    model.share(cache)  # turned keys are nobody else's
    assert model.attach(model.new_cache(), ids_of(150)) == 0
    assert model.reusable_prefix(cache, ids_of(150)) == 0
    model.rescale(NONE, "rotate", caches=[])
    assert model.attach(model.new_cache(), ids_of(150)) == 149


@every_variant
@pytest.mark.parametrize("kind", ["fp16", "q8", "q4"])
def test_no_shared_page_is_written(folder: Path, variant: Variant, kind: str) -> None:
    model = loaded(folder, variant, cache_type=kind)
    first = read(model, 150)
    model.share(first)
    second = model.new_cache()
    model.attach(second, ids_of(150))
    third = read(model, 150, seed=2)
    pages, before = [held.page for held in first.pages], bytes_of(first)
    model.rescale(YARN, caches=[second, third])
    model.shift(third, 10, 20)
    assert unchanged(first, before) and [held.page for held in first.pages] == pages
    assert model.accepts(second) and second.length == 149
    model.rescale(YARN, caches=[first])  # the tree still holds what it was
    fourth = model.new_cache()
    model.rescale(NONE, caches=[])
    assert model.attach(fourth, ids_of(150)) == 149
    assert all(map(torch.equal, bytes_of(fourth)[:2], before[:2]))


def test_caches_that_share_pages_still_share_them_when_they_are_turned(folder: Path) -> None:
    model = loaded(folder)
    first = read(model, 130)
    model.share(first)
    second = model.new_cache()
    model.attach(second, ids_of(130))
    model.rescale(YARN)
    assert first.pages[:2] == second.pages[:2]
    alone = loaded(folder)
    expected = read(alone, 130)
    alone.rescale(YARN)
    second.truncate(128)
    for cache in (first, second):
        cache.truncate(128)
        expected.truncate(128)
        assert torch.equal(model.forward([5], cache), alone.forward([5], expected))


def test_a_page_for_each_copy_is_found_in_the_tree_or_it_is_an_error_that_changes_nothing(folder: Path) -> None:
    page = loaded(folder).cache_bytes(64)
    model = loaded(folder, cache_memory=4 * page)
    cache = read(model, 150)
    model.share(cache)
    model.rescale(LINEAR)  # 3 of 4 pages are held by both: the tree forgets them
    assert model.cache_used == 3 * page
    first = read(model, 64, seed=3)
    second = model.new_cache()
    model.share(first)
    cache.truncate(128)
    model.attach(second, ids_of(100, 3)[:64] + [1, 2])
    read_too = read(model, 60, seed=4)
    assert model.cache_used == 4 * page
    before, rope = bytes_of(cache), model.rope
    with pytest.raises(CacheFullError, match="shared with other sequences, and there is no memory for copies"):
        model.rescale(YARN, caches=[cache, second, read_too])
    assert model.rope == rope and unchanged(cache, before)
    assert all(map(model.accepts, (cache, first, second, read_too)))


@pytest.mark.parametrize("mode", ["rotate", "recompute"])
def test_what_is_refused_leaves_everything_as_it_was(folder: Path, mode: str) -> None:
    model = loaded(folder)
    cache = read(model)
    before, rope = bytes_of(cache), model.rope
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"rope_scaling": {"rope_type": "nonsense"}}, ValueError, "nonsense"),
        ({"rope_scaling": LINEAR, "mode": "quickly"}, ConfigError, "mode must be one of 'rotate', 'recompute'"),
        ({"rope_scaling": LINEAR, "alpha_value": 2.0}, ConfigError, "give one or the other"),
        ({"rope_scaling": LINEAR, "max_seq_len": 100}, RequestError, "less than the 150 positions of a cache"),
        ({"rope_scaling": LINEAR, "max_seq_len": 0}, ConfigError, "max_seq_len must be"),
        ({"rope_scaling": LINEAR, "max_seq_len": 1 << 24}, ConfigError, "cache_memory"),
        ({"rope_scaling": LINEAR, "caches": [read(loaded(folder))]}, RequestError, "another model"),
        ({"rope_scaling": LINEAR, "caches": ["x"]}, RequestError, "made by model.new_cache"),
    ]
    for options, kind, message in refused:
        with pytest.raises(kind, match=message):
            model.rescale(**{"mode": mode, **options})
        assert model.rope == rope and model.max_seq_len == 256 and unchanged(cache, before) and model.accepts(cache)


def test_another_part_of_the_features_cannot_be_turned_to(folder: Path) -> None:
    model = loaded(folder)
    cache = read(model)
    partial = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match="rotated features.*give mode='recompute'"):
        model.rescale(partial)
    assert model.accepts(cache)
    model.rescale(partial, "recompute")
    fresh = loaded(folder, rope_scaling=partial)
    assert torch.equal(model.forward([5], cache), fresh.forward([5], read(fresh)))


def test_the_window_grows_as_far_as_the_pool_goes(folder: Path) -> None:
    page = loaded(folder).cache_bytes(64)
    model = loaded(folder, cache_memory=8 * page)
    cache, small = read(model, 250), model.new_cache(32)
    with pytest.raises(ConfigError, match="ask for a max_seq_len of at most 512"):
        model.rescale(YARN, max_seq_len=513)
    model.rescale(YARN, max_seq_len=512)
    assert (model.max_seq_len, cache.capacity, small.capacity, model.new_cache().capacity) == (512, 512, 32, 512)
    model.forward(ids_of(100, 5), cache, "none")
    model.rescale(YARN, max_seq_len=400)
    assert cache.capacity == 400


@pytest.mark.parametrize("mode", ["rotate", "recompute"])
def test_rescaling_can_be_watched_and_cancelled(folder: Path, mode: str) -> None:
    model = loaded(folder, max_input_len=50)
    caches = [read(model), read(model, 70, seed=1)]
    before, rope, seen = [bytes_of(cache) for cache in caches], model.rope, []
    assert not model.rescale(LINEAR, mode, cancelled=lambda: True)
    assert model.rope == rope and all(map(unchanged, caches, before)) and all(map(model.accepts, caches))
    assert model.rescale(LINEAR, mode, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (220, 220)
    if mode == "recompute":
        calls = iter([False] * 9 + [True])
        assert not model.rescale(NONE, mode, cancelled=lambda: next(calls))
        assert all(map(model.accepts, caches))


def test_recomputing_uses_the_adapters_of_each_stretch(folder: Path) -> None:
    model, fresh = loaded(folder), loaded(folder, rope_scaling=YARN)
    cache, expected = model.new_cache(), fresh.new_cache()
    for each, target in ((model, cache), (fresh, expected)):
        each.load_adapter(folder / "storm", "storm")
        each.forward(ids_of(70), target, "none", adapters="storm", seq_len=100)
        each.forward(ids_of(30, 1), target, "none", seq_len=100)
    model.rescale(YARN, "recompute")
    assert torch.equal(model.forward([5], cache), fresh.forward([5], expected))
    model.unload_adapter("storm")
    with pytest.raises(RequestError, match="unloaded"):
        model.rescale(NONE, "recompute")
    assert model.accepts(cache)
    model.rescale(NONE, "rotate")


def test_an_interrupted_turn_leaves_no_cache_half_turned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder)
    cache, rope = read(model), model.rope
    monkeypatch.setattr(type(model.backend), "move_rows_", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.rescale(LINEAR)
    assert model.rope == rope and cache.length == 0


@every_variant
@pytest.mark.parametrize("chunks", [[70, 1, 1, 1, 90], [1] * 100, [100, 60, 3]])
def test_keys_that_outgrow_their_length_are_turned_for_the_next_of_a_row_of_lengths(folder, variant, chunks) -> None:
    model = loaded(folder, variant, rope_scaling=DYNAMIC)
    cache = model.new_cache()
    ids = ids_of(sum(chunks))
    reaches = []
    for chunk in chunks:
        model.forward(ids[cache.length : cache.length + chunk], cache, "none")
        assert cache.frequencies == model.frequencies(cache.reach) and cache.reach >= cache.length
        reaches.append(cache.reach)
    assert reaches[0] == chunks[0] and set(reaches[1:]) <= {64, 128, 192, 256, reaches[0]}
    again = model.new_cache()  # segment by segment, to the same bits
    for start, end, seq_len in cache.segments:
        model.forward(ids[start:end], again, "none", seq_len=seq_len)
    if variant.backend == "cpu":
        assert torch.equal(model.forward([5], cache), model.forward([5], again))


@pytest.mark.parametrize("variant", variants("exact", "cpu"), ids=str)
def test_one_layer_that_grows_is_one_that_was_read_for_its_length(one_layer: Path, variant: Variant) -> None:
    model = loaded(one_layer, variant, rope_scaling=DYNAMIC)
    cache, ids = model.new_cache(), ids_of(200)
    for start in range(0, 200, 10):
        model.forward(ids[start : start + 10], cache, "none")
    fresh = model.new_cache()
    model.forward(ids, fresh, "none", seq_len=cache.reach)
    torch.testing.assert_close(model.forward([5], cache), model.forward([5], fresh), atol=1e-4, rtol=1e-4)


def test_growth_by_recomputing_has_the_bits_of_a_call_for_the_grown_length(folder: Path) -> None:
    model = loaded(folder, rope_scaling=DYNAMIC, rope_growth="recompute")
    cache, ids = model.new_cache(), ids_of(150)
    model.forward(ids[:100], cache, "none")
    for start in (100, 101, 130):
        got = model.forward(ids[start : start + 1 + 28 * (start == 101)], cache)
        fresh = model.new_cache()
        expected = model.forward(ids[: cache.length], fresh, seq_len=cache.reach)
        assert torch.equal(got, expected) and not cache.was_moved
    with pytest.raises(ConfigError, match="rope_growth must be one of 'rotate', 'recompute'"):
        loaded(folder, rope_growth="never")


@pytest.mark.parametrize("variant", variants("int8", "cpu")[:1], ids=str)
def test_equal_origins_mean_equal_bits_whatever_was_done(folder: Path, variant: Variant) -> None:
    """Random histories, each run twice with its chunks cut and its prefixes shared in other ways."""
    operations = st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 70)),
            st.tuples(st.just("truncate"), st.floats(0.3, 1)),
            st.tuples(st.just("shift"), st.floats(0, 1), st.floats(0, 1)),
            st.tuples(st.just("rescale"), st.sampled_from(SCALINGS), st.sampled_from(["rotate", "recompute"])),
            st.tuples(st.just("share")),
        ),
        min_size=1,
        max_size=8,
    )
    models = [loaded(folder, variant, max_input_len=chunk, cache_type=kind) for chunk, kind in ((7, "q8"), (64, "q8"))]
    seen: dict[Any, list[torch.Tensor]] = {}

    @settings(max_examples=40, deadline=None)
    @given(operations=operations)
    def check(operations: list[tuple]) -> None:
        results = []
        for model in models:
            model.rescale(NONE, caches=[])
            cache = model.new_cache()
            for number, operation in enumerate(operations):
                apply(model, cache, operation, number)
            results.append((identity(cache), filled_bytes(cache)))
        (one, ours), (other, theirs) = results
        assert one == other and all(map(torch.equal, ours, theirs))
        before = seen.setdefault(one, ours)
        assert all(map(torch.equal, ours, before))
        for key, rows in seen.items():  # other origins of the same tokens: other bits
            if key[0] == one[0] and key != one and len(one[0]) > 1:
                assert not all(map(torch.equal, ours, rows)) or same_by_chance(key, one)

    check()


def apply(model: Model, cache: KvCache, operation: tuple, number: int) -> None:
    """One of the operations of the test above, where it is possible."""
    name, *values = operation
    if name == "append":
        model.forward(ids_of(min(values[0], 250 - cache.length) or 1, number), cache, "none")
    elif name == "truncate":
        cache.truncate(int(values[0] * cache.length))
    elif name == "shift":
        keep = int(values[0] * cache.length)
        model.shift(cache, keep, int(values[1] * (cache.length - keep)))
    elif name == "rescale":
        model.rescale(*values, caches=[cache])
    else:
        model.share(cache)


def identity(cache: KvCache) -> tuple:
    """The tokens of a cache, and where each stretch of them comes from."""
    return tuple(cache.token_ids), tuple((start, end, segment.origin) for start, end, segment in cache.stretches)


def same_by_chance(one: tuple, other: tuple) -> bool:
    """Moves that change nothing: from a rotation to an equal one, or a shift of nothing but position 0."""
    return len(one[0]) < 3


def filled_bytes(cache: KvCache) -> list[torch.Tensor]:
    """What the next token sees: its logits, which depend on every key and value."""
    model = cache.owner
    copy = model.new_cache()
    copy.hold_(cache.pages)
    copy._token_ids, copy._segments = list(cache._token_ids), list(cache._segments)
    copy._reach, copy._turned_at, copy.rope = cache._reach, cache._turned_at, cache.rope
    if cache.length == cache.capacity:
        return []
    return [model.forward([7], copy, seq_len=max(cache.reach, cache.length + 1))]
