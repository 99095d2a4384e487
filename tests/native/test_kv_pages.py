"""Pages of codes and of recent positions: one limit, memory that can be saved, rows that move, and what is refused."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from cpu_pages import BITS
from kernel_support import every_isa, same_bits
from paged_attention import PagedAttention
from ropewalk import _core, native
from ropewalk.backends.cpu import CpuBackend
from ropewalk.backends.reference.attention import rotate_
from ropewalk.backends.reference.codes import decode, encode, hadamard
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CacheFormat, is_rotated

BACKEND = CpuBackend("int8", threads=2)
HEADS = (2, 2, 48)
ROWS = 192


def rows(count: int, num_heads: int = 2, dim: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, num_heads, dim, generator=torch.Generator().manual_seed(seed))


def pool_of(text: str, num_bytes: int = 1 << 24):
    return BACKEND.new_pool(2, 48, CacheFormat.parse(text), num_bytes)


def test_both_kinds_of_pages_count_towards_one_limit():
    pool = pool_of("q4+64")
    codes, recent = pool.page_bytes(3), pool.page_bytes(3, recent=True)
    assert codes == 3 * 64 * 2 * 2 * 64 * 9 // 16 and recent == 3 * 64 * 2 * 2 * 48 * 2
    pool = pool_of("q4+64", 2 * codes + recent)
    held = [pool.take(3), pool.take(3, recent=True), pool.take(3)]
    assert pool.used_bytes == 2 * codes + recent
    for kind in (False, True):
        with pytest.raises(MemoryError):
            pool.take(3, recent=kind)
    del held[1]
    assert pool.used_bytes == 2 * codes
    held.append(pool.take(3))  # what the other kind gave back is not kept beyond the limit
    with pytest.raises(MemoryError):
        pool.take(3, recent=True)


def test_a_copy_is_of_the_same_kind():
    pool = pool_of("q8+128")
    for recent in (False, True):
        page = pool.take(2, recent)
        pool.parts_of(page)[0].fill_(7)
        copy = pool.copy(page)
        assert torch.equal(pool.parts_of(copy)[0], pool.parts_of(page)[0])
        assert pool.parts_of(copy)[0].numel() == pool.page_bytes(2, recent)


def test_the_memory_of_a_page_keeps_it_and_can_be_written():
    pool = pool_of("q6")
    part = pool.parts_of(pool.take(1))[0]
    gc.collect()
    assert part.dtype == torch.uint8 and pool.used_bytes == pool.page_bytes(1) == part.numel()
    part.fill_(3)
    assert part.sum() == 3 * part.numel()
    del part
    gc.collect()
    assert pool.used_bytes == 0


@pytest.mark.parametrize("text", ["fp16", "q8", "q4_q6", "q4+64"])
def test_saved_pages_give_the_bits_of_those_that_were_saved(text):
    q, k, v = rows(101, seed=1), rows(101, seed=2), rows(101, seed=3)
    first, second = PagedAttention(text, HEADS), PagedAttention(text, HEADS, fill=255)
    assert first.pool.layout == second.pool.layout
    first.run(q[:100], k[:100], v[:100], 0)
    second.reserve(100)
    for source, target in zip(first.pages + first.recent, second.pages + second.recent, strict=True):
        second.pool.parts_of(target)[0].copy_(first.pool.parts_of(source)[0])
    assert same_bits(*(cache.run(q[100:], k[100:], v[100:], 100) for cache in (first, second)))


def test_a_layout_is_named_for_all_that_it_depends_on():
    names = {pool_of(text).layout for text in ("fp16", "q8", "q8_q4", "q8+64", "q4")}
    names |= {BACKEND.new_pool(2, 64, CacheFormat.parse("q8"), 0).layout}
    names |= {BACKEND.new_pool(4, 48, CacheFormat.parse("q8"), 0).layout}
    assert len(names) == 7


def filled(text: str, isa: str, seed: int = 0) -> PagedAttention:
    """ROWS positions in two layer instances."""
    cache = PagedAttention(text, HEADS, isa=isa, threads=2, instances=2)
    for instance in (0, 1):
        inputs = (rows(ROWS, seed=10 * seed + 5 * instance + part) for part in range(3))
        cache.run(*inputs, 0, instance=instance)
    return cache


def moved(cache: PagedAttention, source, target, start: int, to: int, angles: torch.Tensor) -> None:
    tables = angles.cos()[None], angles.sin()[None]
    cache.backend.move_rows_(source, start, target, to, len(angles), *tables, [0, 0])


@every_isa
@pytest.mark.parametrize("text", ["fp32", "fp16", "q8", "q6", "q4", "q4_q8"])
@pytest.mark.parametrize("count, start, to", [(100, 70, 70), (100, 70, 33), (64, 128, 64), (1, 191, 0), (90, 100, 99)])
def test_moved_keys_are_turned_and_values_stay_as_they_are(isa, text, count, start, to):
    cache = filled(text, isa)
    before = [cache.halves(instance) for instance in (0, 1)]
    angles = rows(count, 1, 20, seed=9)[:, 0]
    moved(cache, cache.pages, cache.pages, start, to, angles)
    kind = cache.format.keys
    for instance in (0, 1):
        for part, field in ((0, "numbers"), (1, "codes" if cache.format.values in BITS else "numbers")):
            old, new = (
                np.concatenate([getattr(pair[part], field) for pair in halves], axis=1)
                for halves in (before[instance], cache.halves(instance))
            )
            others = np.setdiff1d(np.arange(ROWS), np.arange(to, to + count))
            assert np.array_equal(new[:, others], old[:, others])
            expected = old[:, start : start + count]
            if part == 0:
                turned = torch.from_numpy(expected).float().transpose(0, 1).contiguous()  # [T, Hkv, D]
                rotate_(turned, angles.cos(), angles.sin())
                expected, tolerance = written(turned, kind).transpose(0, 1).numpy(), step_of(turned, kind)
                assert np.abs(new[:, to : to + count] - expected).max() <= tolerance
            else:
                assert np.array_equal(new[:, to : to + count], expected)


def written(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x as a cache keeps it."""
    if kind not in BITS:
        return x.half().float() if kind == "fp16" else x
    y = decode(*encode(hadamard(x) if is_rotated(kind) else x, BITS[kind]), BITS[kind], x.shape[-1])
    return hadamard(y) if is_rotated(kind) else y


def step_of(x: torch.Tensor, kind: str) -> float:
    """A key whose float32 sums were rounded otherwise may take the neighbouring code, in every dim of its piece."""
    return float(x.abs().max()) * ({"fp32": 1e-6, "fp16": 1e-3}.get(kind) or 4 / (2 ** BITS[kind] - 1))


@every_isa
@pytest.mark.parametrize("text, recent", [("fp16", False), ("q8", False), ("q4", False), ("q4+64", True)])
def test_rows_that_move_to_pages_of_their_own_and_do_not_turn_read_as_before(isa, text, recent):
    cache = filled(text, isa)
    source = cache.recent if recent else cache.pages
    target = [cache.pool.take(2, recent) for _ in source]
    before = [cache.halves(instance, recent) for instance in (0, 1)]
    moved(cache, source, target, 0, 0, torch.zeros(ROWS, 24))
    source[:] = target
    for instance in (0, 1):
        for old, new in zip(before[instance], cache.halves(instance, recent), strict=True):
            assert np.array_equal(new[1].numbers, old[1].numbers)
            # A key is rounded anew: what it reads may not be a multiple of the scale that it then has.
            tolerance = 0 if recent or text == "fp16" else step_of(torch.from_numpy(old[0].numbers), text)
            assert np.abs(new[0].numbers - old[0].numbers).max() <= tolerance


MOVES = {
    "beyond-source": (dict(source_start=150), "50 positions from 150 on do not fit the 3 pages of source"),
    "beyond-target": (dict(target_start=2**62), "do not fit the 3 pages of target"),
    "negative": (dict(source_start=-1), "do not fit the 3 pages of source"),
    "negative-rows": (dict(num_rows=-1), "num_rows is out of range"),
    "upwards": (dict(target_start=1), "rows would be written before they are read"),
    "cos-rows": (dict(cos=np.zeros((1, 49, 8), np.float32)), "cos has shape [1, 49, 8]; expected [1, 50, 8]"),
    "cos-dtype": (dict(cos=np.zeros((1, 50, 8))), "cos has dtype float64"),
    "sin-columns": (dict(sin=np.zeros((1, 50, 7), np.float32)), "sin has shape [1, 50, 7]; expected [1, 50, 8]"),
    "wide": (dict.fromkeys(("cos", "sin"), np.zeros((1, 50, 25), np.float32)), "more than D / 2 columns"),
    "table": (dict(tables=[1]), "by a table that there is not"),
    "below": (dict(tables=[-2]), "by a table that there is not"),
    "tables": (dict(tables=[0, 0]), "for each layer instance"),
    "no-pages": (dict(source=[]), "source has no pages"),
    "none": (dict(target=[None] * 3), "a page is None"),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_refused_before_anything_is_touched(name):
    changes, message = MOVES[name]
    pool = pool_of("q8")
    pages = [pool.take(1) for _ in range(3)]
    table = np.zeros((1, 50, 8), np.float32)
    places = dict(source=pages, source_start=0, target=pages, target_start=0, num_rows=50)
    given = dict(**places, cos=table, sin=table, tables=[0])
    with pytest.raises(ShapeError) as error:
        _core.move_rows(BACKEND.runtime.core, **given | changes)
    assert message in str(error.value)


def test_rows_move_between_pages_of_one_pool_kind_and_size_alone():
    pool, table = pool_of("q8+64"), torch.zeros(1, 5, 8)
    page = pool.take(1)
    for other in (pool.take(1, recent=True), pool.take(2), pool_of("q8+64").take(1)):
        with pytest.raises(ShapeError, match="several pools, kinds or numbers of layer instances"):
            BACKEND.move_rows_([page], 0, [other], 0, 5, table, table, [0])


def test_a_step_is_refused_recent_pages_that_do_not_fit():
    pool = pool_of("q8+64")
    pages, recent = [pool.take(1) for _ in range(3)], [pool.take(1, recent=True) for _ in range(3)]
    x, table = np.zeros((2, 8), np.float32), np.zeros((1, 2, 0), np.float32)

    def step(start: int, given: list, kept: list) -> None:
        _core.Step(x, table, table, [(2, start, given, kept)])

    step(130, pages, [None, *recent[1:]])
    for start, given, kept, message in (
        (130, pages, [], "for each of its pages"),
        (130, pages, recent[:2], "for each of its pages"),
        (127, pages, [None, None, recent[2]], "is None where a row reads it"),
        (120, pages, [recent[0], None, recent[2]], "is None where a row reads it"),
        (130, pages, [None, pages[1], recent[2]], "of another kind"),
        (130, recent, recent, "of those for the last positions"),
        (130, pages, [None, recent[1], pool_of("q8+64").take(1, recent=True)], "of another kind"),
    ):
        with pytest.raises(ShapeError, match=message):
            step(start, given, kept)
    plain = pool_of("q8")
    with pytest.raises(ShapeError, match="has no pages of the last positions"):
        step(0, [plain.take(1)], [recent[0]])
    with pytest.raises(ShapeError, match="has no pages of the last positions"):
        plain.take(1, recent=True)


def test_two_sequences_do_not_share_a_recent_page_that_one_writes():
    pool = pool_of("q8+64")
    pages, recent = [pool.take(1) for _ in range(2)], pool.take(1, recent=True)
    x, table = np.zeros((2, 8), np.float32), np.zeros((1, 2, 0), np.float32)
    with pytest.raises(ShapeError, match="used by another"):
        _core.Step(x, table, table, [(1, 0, pages[:1], [recent]), (1, 0, pages[1:], [recent])])


@pytest.mark.parametrize("recent, text", [(63, "q8"), (-64, "q8"), (64, "f16"), (2**62, "q4")])
def test_a_pool_refuses_a_window_that_cannot_be(recent, text):
    with pytest.raises(ShapeError, match="recent"):
        _core.PagePool(2, 48, text, 1 << 20, recent)


def test_the_cache_of_the_kernels_alone_has_no_recent_window():
    with pytest.raises(ShapeError, match=r"type of a cache is 'q8\+64'; accepted: 'f32', 'f16', 'q8'"):
        native.KvCache(BACKEND.runtime, 2, 48, 100, "q8+64")
    with pytest.raises(ShapeError, match="compute"):
        cache = native.KvCache(BACKEND.runtime, 2, 48, 100, "q8")
        cache.attend(torch.zeros(0, 2, 48), 0, None, "fp16")
