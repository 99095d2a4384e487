"""Pages in every format: the codes of the reference backend, attention over what they read as, and moved rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_formats import Appended, as_held, as_read, head_rows, sequence
from gpu_pages import INSTANCE, INSTANCES, nan_pages, new_pool, step_of
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import attention, heads
from ropewalk.backends.gpu.attention import Attention, attend
from ropewalk.backends.gpu.attention_tiles import CHUNK
from ropewalk.backends.gpu.backend import GpuBackend
from ropewalk.backends.gpu.pages import GpuPage
from ropewalk.backends.gpu.step import SHORT_ROWS
from ropewalk.backends.protocol import PAGE_TOKENS, RowSpan
from ropewalk.backends.reference import codes as reference
from ropewalk.backends.reference.attention import rotate_ as reference_rotate_
from ropewalk.backends.reference.backend import ReferenceBackend
from ropewalk.backends.reference.pages import append_ as reference_append_
from ropewalk.backends.shared import Seen
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CODE_BITS, CacheFormat, is_rotated
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around

FORMATS = ["q8", "q6", "q4", "q8_q4", "q4_fp16", "fp32_q6"]
HEADS = [(2, 64), (1, 80), (3, 20)]  # of keys and values, and their size: whole blocks, three of them, less than one


def assert_holds(pages: Sequence[GpuPage], name: str, x: torch.Tensor, start: int) -> None:
    """x: [T, Hkv, D] float32 is what positions start.. were given, rounded as the reference backend rounds it."""
    layout = pages[0].layout
    kind = getattr(layout.cache_format, name)
    for position, row in enumerate(x.cpu(), start):
        page, place = divmod(position, PAGE_TOKENS)
        part = getattr(pages[page], name)[INSTANCE]
        for head in range(layout.num_kv_heads):
            held = head_rows(part[head].contiguous().flatten().view(torch.uint8).cpu(), kind, layout.head_dim)
            if kind not in CODE_BITS:
                assert torch.equal(held[place], row[head].to(held.dtype))
                continue
            given = reference.hadamard(row[head]) if is_rotated(kind) else row[head]
            codes, scales = reference.encode(given, CODE_BITS[kind])
            assert torch.equal(held[0][place], codes) and torch.equal(held[1][place], scales)


@pytest.mark.parametrize("cache_type", FORMATS)
@pytest.mark.parametrize("num_kv_heads, head_dim", HEADS)
def test_rows_are_rounded_to_the_bits_of_the_reference(cache_type: str, num_kv_heads: int, head_dim: int) -> None:
    pages = nan_pages(new_pool(num_kv_heads, head_dim, cache_type), 67)
    k, v = (guarded(normal(5, num_kv_heads, head_dim, seed=seed).to(DEVICE)) for seed in (1, 2))
    k[1], v[2, 0, : head_dim // 2], v[3] = 0, 1e-7, v[3] * 3e3
    angles = normal(5, head_dim // 4, seed=3) * 1e4
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    q, rotated = k.clone(), k.clone()
    reference_rotate_(rotated, cos, sin)
    heads.rotate_append_(step_of([RowSpan(5, 62, pages)], cos, sin), q, k, v, INSTANCE)
    assert same_bits(q, rotated)
    assert_holds(pages, "keys", rotated, 62)
    assert_holds(pages, "values", v, 62)
    written = sum(int((page.memory != 255).any(1).sum()) for page in pages)
    assert written == 2 and all((page.memory[1 - INSTANCE] == 255).all() for page in pages)
    untouched = as_read(pages, "values", 62)
    assert untouched.isnan().all()


def test_a_block_with_what_is_not_finite_has_no_finite_number() -> None:
    pages = nan_pages(new_pool(1, 64, "q8"), 3)
    k = normal(3, 1, 64).to(DEVICE)
    k[0, 0, 3], k[1, 0, 40] = float("inf"), float("nan")
    heads.append_(step_of([RowSpan(3, 0, pages)]), k, k, INSTANCE)
    found = as_read(pages, "keys", 3)[0]
    assert found[0, :32].isnan().all() and found[1, 32:].isnan().all()
    assert found[0, 32:].isfinite().all() and found[1, :32].isfinite().all() and found[2].isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128, 80, 7])
def test_heads_are_turned_as_by_the_reference_bit_for_bit(head_dim: int) -> None:
    x = guarded(normal(3, 9, head_dim).to(DEVICE))
    out = guarded(torch.full(x.shape, float("nan"), device=DEVICE))
    heads.turn_(x, out)
    assert same_bits(out.contiguous(), reference.hadamard(x.cpu()).to(DEVICE)) and room_around(out).isnan().all()
    heads.turn_(x, x)
    assert same_bits(x.contiguous(), out.contiguous())


def queries(num_rows: int, num_heads: int, head_dim: int) -> torch.Tensor:
    """[T, Hq, D] within wider rows, NaN beside."""
    return guarded(normal(num_rows, num_heads, head_dim, seed=99).to(DEVICE))


def attended(
    spans: Sequence[RowSpan],
    q: torch.Tensor,
    window: int | None = None,
    exact: bool = False,
    softcap: float | None = None,
) -> torch.Tensor:
    """[T, Hq, D]; nothing beside it was written, and the queries are as they were."""
    out, before = guarded(torch.full(q.shape, float("nan"), device=DEVICE)), q.clone()
    seen = Seen(window, 1 / math.sqrt(q.shape[2]), softcap)
    attend(step_of(spans), q, INSTANCE, seen, out, exact)
    assert room_around(out).isnan().all() and same_bits(q.contiguous(), before)
    return out.contiguous()


def by_hand(
    part: Appended, q: torch.Tensor, window: int | None, dtype: torch.dtype, softcap: float | None = None
) -> torch.Tensor:
    """The formula over what the pages read as, for the rows of a sequence; each row has its own recent pages.

    Sums in float64, or in float32 of products whose factors are rounded to `dtype`, codes as they are rotated.
    """
    cache_format, end = part.pages[0].layout.cache_format, len(part.k)
    older = [as_held(part.pages, name, end) for name in ("keys", "values")]
    recent = [as_held(part.recent, name, end) for name in ("keys", "values")] if part.recent else older
    q = q.cpu()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    limit = None if softcap is None else softcap * math.log2(math.e)
    turns = {name: is_rotated(getattr(cache_format, name)) for name in ("keys", "values")}
    results = []
    for row, query in enumerate(q):
        pos = part.start + row
        edge = PAGE_TOKENS * cache_format.first_exact_page(pos) if part.recent else pos + 1
        low = max(0, pos + 1 - (window or 1 << 30))
        result = torch.zeros(q.shape[1:], dtype=sums)
        group = q.shape[1] // older[0].shape[0]
        scores, pieces = [], []
        for (k, v), first, stop, is_coded in ((older, low, edge, True), (recent, max(low, edge), pos + 1, False)):
            turned = turns if is_coded else dict.fromkeys(turns, False)
            keys, values = (each[:, first:stop].to(dtype).to(sums) for each in (k, v))
            scaled = reference.hadamard(query.to(sums)) if turned["keys"] else query.to(sums)
            scaled = (scaled * (math.log2(math.e) / math.sqrt(q.shape[2]))).to(dtype).to(sums)
            found = torch.einsum("hd,hsd->hs", scaled, keys.repeat_interleave(group, 0))
            scores.append(found if limit is None else limit * torch.tanh(found / limit))
            pieces.append((values.repeat_interleave(group, 0), turned["values"]))
        top = torch.cat(scores, 1).amax(1, keepdim=True)
        total = torch.zeros(q.shape[1], 1, dtype=sums)
        for score, (values, is_turned) in zip(scores, pieces, strict=True):
            p = torch.exp2(score - top).to(dtype).to(sums)
            total += p.sum(1, keepdim=True)
            summed = torch.einsum("hs,hsd->hd", p, values)
            result += reference.hadamard(summed) if is_turned else summed
        results.append(result / total)
    return torch.stack(results)


def assert_follows_the_formula(
    found: torch.Tensor,
    parts: Sequence[Appended],
    q: torch.Tensor,
    window: int | None,
    dtype: torch.dtype,
    softcap: float | None = None,
) -> None:
    sizes = [part.num_rows for part in parts]
    for part, rows, got in zip(parts, q.split(sizes), found.split(sizes), strict=True):
        exact, plain = (by_hand(part, rows, window, each, softcap) for each in (torch.float64, dtype))
        assert_as_accurate(got.cpu(), exact, plain)


PLACES = [(3, 2), (500, 20), (600, 1)]
CASES = [  # arithmetic, format, window, cap of scores
    *(("fp16", cache_type, None, None) for cache_type in ("q8", "q6", "q4", "q8_q4", "q4_fp16")),
    ("exact", "q8", None, None),
    ("exact", "q4", 100, 4.0),
    ("fp16", "fp32_q6", None, None),  # products in float32 beside float32 keys
    ("fp16", "q4", 100, None),
    ("fp16", "q4+64", None, 4.0),
    ("fp16", "q8_q4+128", 300, None),
    ("exact", "q6+64", 100, None),
    ("fp16", "q8+1024", None, None),  # more than there is
]


@pytest.mark.parametrize("compute, cache_type, window, softcap", CASES)
def test_rows_attend_to_what_the_pages_read_as(
    compute: str, cache_type: str, window: int | None, softcap: float | None
) -> None:
    pool = new_pool(1, 32, cache_type)
    parts = [sequence(pool, start, rows, seed) for seed, (start, rows) in enumerate(PLACES)]
    q = queries(23, 2, 32)
    found = attended([part.span() for part in parts], q, window, compute == "exact", softcap)
    float32 = compute == "exact" or "fp32" in cache_type
    assert_follows_the_formula(found, parts, q, window, torch.float32 if float32 else torch.float16, softcap)


@pytest.mark.parametrize(
    "major, cache_type, head_dim",
    [*((8, "q4+64", head_dim) for head_dim in (20, 80, 128)), (8, "q6_q8", 256), (9, "q6_q8", 64), (9, "q8_q6", 128)],
)
def test_heads_of_any_size_fit_the_tiles_of_every_card(major: int, cache_type: str, head_dim: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_major", lambda device: major)
    pool = new_pool(1, head_dim, cache_type)
    parts = [sequence(pool, 70, 18, 1), sequence(pool, 130, 1, 2)]
    q = queries(19, 2, head_dim)
    found = attended([part.span() for part in parts], q)
    assert_follows_the_formula(found, parts, q, None, torch.float16)


@pytest.mark.parametrize("cache_type, window", [("q4", None), ("q8", 600), ("q6+64", None), ("q4+512", 700)])
def test_a_row_has_the_same_bits_alone_in_chunks_and_beside_others(cache_type: str, window: int | None) -> None:
    """The rows go over the end of a chunk of keys and over ends of pages, where the window moves on."""
    pool, num_rows = new_pool(1, 32, cache_type), 26
    main, other = sequence(pool, CHUNK - 13, num_rows, 1), sequence(pool, 640, 2, 2)
    q = queries(num_rows + 2, 2, 32)
    whole = attended([other.span(), main.span()], q, window)[2:]
    for first, end in ((0, 1), (num_rows - 1, num_rows), (5, 5 + SHORT_ROWS), (7, 8 + SHORT_ROWS)):
        alone = attended([main.span(first, end)], q[2 + first : 2 + end], window)
        assert same_bits(alone, whole[first:end]), (first, end)


@pytest.mark.parametrize("cache_type", ["q8_q4", "q4+128"])
def test_split_keys_give_the_bits_of_whole_ones(cache_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(1, 32, cache_type)
    parts = [sequence(pool, start, rows, seed) for seed, (start, rows) in enumerate([(1030, 1), (511, 3), (0, 4)])]
    q, spans = queries(8, 2, 32), [part.span() for part in parts]
    launched = []
    chunks = Attention._attend_chunks
    monkeypatch.setattr(Attention, "_attend_chunks", lambda *args: (launched.append(args), chunks(*args)))
    split = attended(spans, q)
    count = len(launched)
    assert count == (2 if "+" in cache_type else 1)
    monkeypatch.setattr(attention, "SCRATCH_BYTES", 0)
    assert same_bits(attended(spans, q), split) and len(launched) == count


def test_keys_that_come_later_change_nothing() -> None:
    """What follows a row, and other instances, is NaN first and something else then."""
    pool = new_pool(1, 32, "q4+64")
    part = sequence(pool, 110, 24)
    q = queries(24, 1, 32)
    whole = attended([part.span()], q)
    assert whole.isfinite().all()
    for page in (*part.pages, *part.recent):
        page.memory[1 - INSTANCE] = 1
    assert len(part.pages) == 4
    for page in (part.pages[3], part.recent[3]):
        page.memory.fill_(7)
    assert same_bits(attended([part.span()], q), whole)
    assert same_bits(attended([part.span(0, 3)], q[:3]), whole[:3])  # its later rows are in the pages


@interpreted_only
@pytest.mark.parametrize("cache_type", ["q4+64", "q6_q8", "q8_q6"])
def test_every_address_is_one_of_a_tensor(cache_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(2, 20, cache_type)
    parts = [sequence(pool, 174, 18, 1, room=0), sequence(pool, 127, 1, 2, room=0)]
    q = queries(19, 2, 20)
    held = [page.memory for part in parts for page in (*part.pages, *part.recent)]
    with inside_arguments(monkeypatch, held):
        attended([part.span() for part in parts], q)
        heads.append_(step_of([part.span() for part in parts]), q, q, INSTANCE)
        for pages in (parts[0].pages, parts[0].recent):
            if pages:
                table = normal(2, 70, 6).to(DEVICE)
                GpuBackend("fp16", DEVICE).move_rows_(pages, 122, pages, 3, 70, table, table, [None, 1])


def test_a_recent_page_that_is_not_given_is_missed() -> None:
    part = sequence(new_pool(1, 32, "q4+64"), 100, 60)
    with pytest.raises(ShapeError, match="span 0 reads pages 0 to 3 in float16, and not all of them are given"):
        step_of([RowSpan(60, 100, part.pages, (None, *part.recent[1:]))])
    with pytest.raises(ShapeError, match="span 0 reads pages 0 to 3 in float16"):
        step_of([RowSpan(60, 100, part.pages)])


def test_addresses_of_recent_pages_are_on_the_device_beside_the_others() -> None:
    part = sequence(new_pool(1, 32, "q4+64"), 0, 200)
    step = step_of([part.span(150, 160)])
    assert step.recent.tolist() == [[0, part.recent[1].address, part.recent[2].address, 0, 0, 0, 0, 0]]
    assert step.numbers.data_ptr() <= step.recent.data_ptr() < step.numbers.data_ptr() + 8 * step.numbers.numel()


def test_a_captured_step_reads_the_pages_of_the_step_that_it_is_replayed_for() -> None:
    """As graphs.py replays it: the numbers of one step copied over those of another of the same layout."""
    pool = new_pool(1, 32, "q4+64")
    held, other = (sequence(pool, start, 1, start) for start in (150, 201))
    q = queries(1, 2, 32)
    step, out = step_of([held.span()]), torch.empty(1, 2, 32, device=DEVICE)
    step.numbers.copy_(step_of([other.span()]).numbers)
    attend(step, q, INSTANCE, Seen(None, 1 / math.sqrt(32), None), out)
    assert same_bits(out, attended([other.span()], q)) and not same_bits(out, attended([held.span()], q))


MOVES = [  # number of rows, by how many places, and the table that turns the keys
    *(("q6_q4", num, shift, 0) for num, shift in ((100, 0), (70, 1), (20, 64))),
    *((cache_type, 100, 37, 1) for cache_type in ("fp16", "fp32", "q8_q6", "q4_q8")),
    *((cache_type, 100, 37, None) for cache_type in ("fp16", "q6_q4")),
]


@pytest.mark.parametrize("cache_type, num, shift, table", MOVES)
def test_rows_are_moved_to_the_bits_of_the_reference(cache_type: str, num: int, shift: int, table: int | None) -> None:
    part = sequence(new_pool(2, 48, cache_type), 0, 192, room=0)
    pool = ReferenceBackend("exact").new_pool(2, 48, CacheFormat.parse(cache_type), 1 << 30)
    expected = [pool.take(INSTANCES) for _ in part.pages]
    reference_append_(expected, INSTANCE, part.k.cpu(), part.v.cpu(), 0)
    angles = normal(2, num, 20, seed=3)
    rotations = [0, table]  # of INSTANCE the table that is looked for
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3  # scaled, as YaRN's are
    ReferenceBackend("exact").move_rows_(expected, 70, expected, 70 - shift, num, cos, sin, rotations)
    tables = cos.to(DEVICE), sin.to(DEVICE)
    GpuBackend("fp16", DEVICE).move_rows_(part.pages, 70, part.pages, 70 - shift, num, *tables, rotations)
    for name in ("keys", "values"):
        wanted = torch.cat([getattr(page, name).read(INSTANCE) for page in expected], dim=1)  # [Hkv, 192, D]
        assert torch.equal(as_read(part.pages, name, 192), wanted)


def test_rows_are_moved_between_pages_and_recent_ones_as_well() -> None:
    pool = new_pool(1, 32, "q4+64")
    part = sequence(pool, 0, 150)
    still = torch.ones(1, 80, 4, device=DEVICE), torch.zeros(1, 80, 4, device=DEVICE)
    for pages, recent in ((part.pages, False), (part.recent, True)):
        target = nan_pages(pool, 128, recent)
        GpuBackend("fp16", DEVICE).move_rows_(pages, 64, target, 10, 80, *still, [0, 0])
        for name in ("keys", "values"):
            found, given = as_read(target, name, 90)[:, 10:], as_read(pages, name, 144)[:, 64:]
            assert torch.equal(found, given) if recent or name == "values" else torch.allclose(found, given, atol=0.2)
            assert as_read(target, name, 10).isnan().all() and as_read(target, name, 128)[:, 90:].isnan().all()


def test_a_move_that_does_not_fit_is_refused() -> None:
    backend, pool = GpuBackend("fp16", DEVICE), new_pool(1, 32, "q8+64")
    pages, recent = nan_pages(pool, 128), nan_pages(pool, 128, recent=True)
    table = torch.ones(1, 10, 4, device=DEVICE)
    for arguments, message in (
        ((pages, 120, pages, 0, 10, table, table), "source: positions 120 to 130 lie outside its 2 pages"),
        ((pages, 0, recent, 0, 10, table, table), "move_rows: the pages differ"),
        ((pages, 0, pages, 0, 10, table.double(), table.double()), "cos must be contiguous float32"),
        ((pages, 0, pages, 0, 10, table.repeat(1, 1, 5), table.repeat(1, 1, 5)), "do not fit heads of 32"),
    ):
        with pytest.raises(ShapeError, match=message):
            backend.move_rows_(*arguments, [0] * INSTANCES)
    backend.move_rows_(pages, 0, pages, 0, 0, table[:, :0], table[:, :0], [0] * INSTANCES)


@pytest.mark.parametrize("cache_type", ["fp16", *FORMATS, "q4+64"])
def test_pages_of_both_kinds_take_what_the_format_says_from_one_limit(cache_type: str) -> None:
    pool, cache_format = new_pool(2, 80, cache_type), CacheFormat.parse(cache_type)
    page, recent = pool.take(3), pool.take(3, recent=True)
    assert pool.page_bytes(3) == 3 * 64 * cache_format.position_bytes(2, 80) == page.memory.numel()
    assert pool.page_bytes(3, recent=True) == 3 * 64 * 2 * 2 * 2 * 80 == recent.memory.numel()
    assert pool.used_bytes == page.memory.numel() + recent.memory.numel()
    copies = [pool.copy(each) for each in (page, recent)]
    assert [copy.layout for copy in copies] == [page.layout, recent.layout]
    assert pool.used_bytes == 2 * (page.memory.numel() + recent.memory.numel())
    del page, recent, copies
    assert pool.used_bytes == 0


def test_the_bytes_of_a_page_restore_it_and_layouts_have_names_of_their_own() -> None:
    part = sequence(new_pool(2, 48, "q6_q4"), 0, 64, room=0)
    pool = new_pool(2, 48, "q6_q4")
    other = pool.take(INSTANCES)
    for memory, saved in zip(pool.parts_of(other), pool.parts_of(part.pages[0]), strict=True):
        assert memory.dtype == torch.uint8 and memory.ndim == 1
        memory.copy_(saved.clone())
    assert torch.equal(as_read([other], "keys", 64), as_read(part.pages, "keys", 64))
    names = {new_pool(*shape, kind).layout for shape in ((2, 48), (1, 48), (2, 64)) for kind in ("q8", "q4", "q4+64")}
    assert len(names) == 9 and new_pool(2, 48, "q6_q4").layout == pool.layout
