"""Attention over pages: as accurate as its dtype, the same bits in every form and company, nothing read beside keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from gpu_pages import INSTANCE, INSTANCES, Cached, cached, nan_pages, new_pool, num_written, step_of
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import attention
from ropewalk.backends.gpu.attention import Attention, Part, attend
from ropewalk.backends.gpu.chunk_kernel import ALL
from ropewalk.backends.gpu.pages import GpuPagePool
from ropewalk.backends.gpu.step import LONG_ROWS, SHORT_ROWS
from ropewalk.backends.protocol import RowSpan
from ropewalk.backends.shared import Seen
from ropewalk.base.errors import ShapeError
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around

CHUNK = attention.CHUNK


def sequences(pool: GpuPagePool, *places: tuple[int, int], room: int = 30) -> list[Cached]:
    """(start, number of rows) of each."""
    return [cached(pool, start, rows, seed, room) for seed, (start, rows) in enumerate(places)]


def queries(num_rows: int, num_heads: int, head_dim: int) -> torch.Tensor:
    """[T, Hq, D] within wider rows, NaN beside."""
    return guarded(normal(num_rows, num_heads, head_dim, seed=99).to(DEVICE))


def attended(
    spans: Sequence[RowSpan],
    q: torch.Tensor,
    window: int | None = None,
    exact: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """[T, Hq, D]; nothing beside it was written. scale: 1 / sqrt(D) if None."""
    out = guarded(torch.full(q.shape, float("nan"), device=DEVICE))
    seen = Seen(window, q.shape[2] ** -0.5 if scale is None else scale, softcap)
    attend(step_of(spans), q, INSTANCE, seen, out, exact)
    assert room_around(out).isnan().all()
    return out


def by_hand(
    sequence: Cached,
    q: torch.Tensor,
    window: int | None,
    dtype: torch.dtype,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The formula for all rows of a sequence: sums in float64 or float32, factors of products rounded to `dtype`."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    num_rows, num_heads, head_dim = q.shape
    group = num_heads // sequence.keys.shape[0]
    k, v = (part.to(dtype).to(sums).repeat_interleave(group, 0) for part in (sequence.keys, sequence.values))
    scale = math.log2(math.e) * (head_dim**-0.5 if scale is None else scale)
    scores = torch.einsum("thd,hsd->hts", (q.to(sums) * scale).to(dtype).to(sums), k)
    if softcap is not None:
        limit = softcap * math.log2(math.e)
        scores = limit * torch.tanh(scores / limit)
    pos = torch.arange(num_rows, device=q.device)[:, None] + sequence.start
    key = torch.arange(k.shape[1], device=q.device)
    hidden = (key > pos) | (key <= pos - (window or 1 << 30))
    scores = scores.masked_fill(hidden, float("-inf"))
    p = torch.exp2(scores - scores.amax(-1, keepdim=True)).to(dtype).to(sums)
    return torch.einsum("hts,hsd->thd", p, v) / p.sum(-1).T[..., None]


def assert_follows_the_formula(
    found: torch.Tensor, parts: Sequence[Cached], q: torch.Tensor, window: int | None, dtype: torch.dtype
) -> None:
    for sequence, rows, got in zip(
        parts, *(each.split([p.num_rows for p in parts]) for each in (q, found)), strict=True
    ):
        if sequence.num_rows:
            exact, plain = (by_hand(sequence, rows, window, each).cpu() for each in (torch.float64, dtype))
            assert_as_accurate(got.cpu(), exact, plain)


PLACES = [(0, 1), (3, 2), (500, 20), (1030, 1), (63, 16)]
KINDS = {  # format of the pages, exact, dtype of the factors of products
    "fp16": ("fp16", False, torch.float16),
    "fp16, exact": ("fp16", True, torch.float32),
    "fp32": ("fp32", False, torch.float32),
}


WINDOWS = [("fp16", window) for window in (None, 1, 100, 520)] + [("fp16, exact", 520), ("fp32", None), ("fp32", 100)]


@pytest.mark.parametrize("kind, window", WINDOWS)
def test_sequences_of_a_step_attend_to_their_own_keys(kind: str, window: int | None) -> None:
    cache_type, exact, product = KINDS[kind]
    parts = sequences(new_pool(1, 16, cache_type), *PLACES)
    q = queries(sum(part.num_rows for part in parts), 2, 16)
    found = attended([part.span() for part in parts], q, window, exact)
    assert_follows_the_formula(found, parts, q, window, product)


@pytest.mark.parametrize("head_dim", [1, 8, 33, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("major", [8, 9])
def test_heads_of_any_size_fit_the_tiles_of_every_card(head_dim: int, major: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_major", lambda device: major)
    parts = sequences(new_pool(1, head_dim), (70, 20), (600, 1))
    q = queries(21, 2, head_dim)
    found = attended([part.span() for part in parts], q)
    assert_follows_the_formula(found, parts, q, None, torch.float16)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (3, 3), (5, 1), (6, 2), (7, 1), (40, 1)])
def test_query_heads_read_the_keys_of_their_group(num_heads: int, num_kv_heads: int) -> None:
    parts = sequences(new_pool(num_kv_heads, 16), (40, 18), (530, 1))
    q = queries(19, num_heads, 16)
    found = attended([part.span() for part in parts], q)
    assert_follows_the_formula(found, parts, q, None, torch.float16)


BIT_CASES = [  # major, head size, window, rows of the prompt: more than one block has, or fewer
    (8, 16, None, LONG_ROWS + 10),
    (8, 128, None, 40),
    (8, 80, 100, 40),
    (8, 256, None, 30),
    (9, 16, 600, LONG_ROWS + 10),
    (9, 128, None, 40),
    (9, 256, 300, 30),
]


@pytest.mark.parametrize("major, head_dim, window, num_rows", BIT_CASES)
def test_a_row_has_the_same_bits_alone_in_chunks_and_beside_others(major, head_dim, window, num_rows, monkeypatch):
    """One row alone is decoded, by split keys; all at once are a prompt; the rest are drafts and chunks of prompts."""
    monkeypatch.setattr(attention, "_major", lambda device: major)
    sequence, other, third = sequences(new_pool(1, head_dim), (CHUNK - 20, num_rows), (1040, 2), (0, 17))
    q = queries(num_rows + 2 + 17, 2, head_dim)
    whole = attended([other.span(), sequence.span(), third.span()], q, window)[2 : 2 + num_rows]
    last = num_rows - 1
    for first, end in ((0, num_rows), (0, 1), (last, num_rows), (10, 10 + SHORT_ROWS), (11, 12 + SHORT_ROWS)):
        alone = attended([sequence.span(first, end)], q[2 + first : 2 + end], window)
        assert same_bits(alone, whole[first:end]), (first, end)


@pytest.mark.parametrize("kind, window", [("fp16", None), ("fp16", 700), ("fp16, exact", 700), ("fp32", None)])
def test_split_keys_give_the_bits_of_whole_ones(kind: str, window: int | None, monkeypatch) -> None:
    cache_type, exact, _ = KINDS[kind]
    parts = sequences(new_pool(1, 24, cache_type), (1030, 1), (CHUNK - 1, 3), (0, 4), (1023, 1))
    q, spans = queries(9, 2, 24), [part.span() for part in parts]
    launched = []
    chunks = Attention._attend_chunks
    monkeypatch.setattr(Attention, "_attend_chunks", lambda *args: (launched.append(args), chunks(*args)))
    split = attended(spans, q, window, exact)
    assert len(launched) == 1
    monkeypatch.setattr(attention, "SCRATCH_BYTES", 0)  # too many states: programs walk over their chunks instead
    whole = attended(spans, q, window, exact)
    assert len(launched) == 1 and same_bits(split, whole)


@pytest.mark.parametrize("kind", ["fp16", "fp16, exact", "fp32"])
def test_scores_are_scaled_and_capped_before_the_mask(kind: str) -> None:
    pool, exact = new_pool(1, 20, kind.partition(",")[0]), kind.endswith("exact")
    product = torch.float16 if kind == "fp16" else torch.float32
    parts = sequences(pool, (510, 20), (600, 1))
    q = queries(21, 2, 20) * 40  # most of the scores are far beyond the cap, to both sides
    how = {"scale": 0.7, "softcap": 5.0}
    found = attended([part.span() for part in parts], q, 100, exact, **how)
    rows = (found[:20].cpu(), found[20:].cpu())
    for part, asked, got in zip(parts, (q[:20], q[20:]), rows, strict=True):
        wanted, plain = (by_hand(part, asked, 100, dtype, **how).cpu() for dtype in (torch.float64, product))
        assert_as_accurate(got, wanted, plain.float())
        assert not torch.allclose(got, by_hand(part, asked, 100, torch.float64, 0.7).cpu().float(), atol=0.1)
    assert same_bits(attended([parts[0].span(7, 8)], q[7:8], 100, exact, **how), found[7:8])


def test_the_window_of_a_span_may_leave_a_chunk_between_its_rows() -> None:
    parts = sequences(new_pool(1, 8), (CHUNK + 95, 8))  # the first rows see the end of chunk 0, the last ones do not
    q = queries(8, 1, 8)
    found = attended([parts[0].span()], q, window=100)
    assert_follows_the_formula(found, parts, q, 100, torch.float16)


def test_states_of_chunks_are_merged_alike_however_many_are_loaded_at_once(monkeypatch) -> None:
    parts = sequences(new_pool(1, 8), (5 * CHUNK + 3, 2))  # six chunks
    q, spans = queries(2, 1, 8), [parts[0].span()]
    found = attended(spans, q)
    assert_follows_the_formula(found, parts, q, None, torch.float16)
    for few, many in ((8, 8), (1, 2), (1, 4)):
        monkeypatch.setattr(attention, "STATES_AT_ONCE", (few, many))
        assert same_bits(attended(spans, q), found)


def test_memory_for_the_states_of_chunks_is_bounded_by_the_window() -> None:
    step = step_of([cached(new_pool(1, 8), 5000, 2).span()])
    for window, chunks in ((None, 10), (1000, 3), (1, 2)):
        call = Attention(step, (), 0, Seen(window, 1.0, None), step.x, True)
        assert call._num_chunks(Part(ALL.value, step.x, step.pages, step.layout, None), step.short) == chunks


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice encountered")  # as meant
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_row_stays_there(value: float) -> None:
    parts = sequences(new_pool(1, 16), (600, 20), (700, 2))
    q = queries(22, 2, 16).clone()
    spans = [part.span() for part in parts]
    before = attended(spans, q)
    q[3, 1, 5], q[21, 0, 0] = value, value
    after = attended(spans, q)
    changed = (before != after).any(-1)  # [T, Hq]
    assert changed.nonzero().tolist() == [[3, 1], [21, 0]]
    assert after[3, 1].isnan().all() and after[21, 0].isnan().all()


def test_later_positions_pages_and_instances_are_not_looked_at() -> None:
    """Pages are NaN wherever no row of the step may look: all of the other instance, and what follows a span's rows."""
    parts = sequences(new_pool(2, 20), (600, 40), (64, 1), (0, 1), room=130)
    for part in parts:
        assert num_written(part.pages[-1:]) == 0 and part.pages[0].keys[1 - INSTANCE].isnan().all()
    q = queries(42, 2, 20)
    found = attended([part.span() for part in parts], q)
    assert found.isfinite().all()
    again = attended([parts[0].span(0, 20)], q[:20])  # keys of its rows 20..40 are there, and are later ones
    assert same_bits(again, found[:20])


@interpreted_only
@pytest.mark.parametrize("window", [None, 65])
def test_every_address_is_one_of_a_tensor(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = sequences(new_pool(2, 20), (500, 40), (1030, 3), (0, 1), room=0)
    q = queries(44, 6, 20)
    with inside_arguments(monkeypatch, [page.memory for part in parts for page in part.pages]):
        attended([part.span() for part in parts], q, window)


@settings(max_examples=7, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_shapes_follow_the_formula_and_give_rows_their_own_bits(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(KINDS)))
    cache_type, exact, product = KINDS[kind]
    head_dim, num_kv_heads = data.draw(st.integers(2, 70)), data.draw(st.integers(1, 2))
    num_heads = num_kv_heads * data.draw(st.integers(1, 4))
    window = data.draw(st.none() | st.integers(1, 600))
    starts = st.integers(0, 80) | st.integers(CHUNK - 3, CHUNK + 3)
    places = data.draw(
        st.lists(
            st.tuples(starts, st.integers(1, 4) | st.integers(SHORT_ROWS + 1, SHORT_ROWS + 5)), min_size=1, max_size=3
        )
    )
    parts = sequences(new_pool(num_kv_heads, head_dim, cache_type), *places, room=data.draw(st.integers(0, 70)))
    q = queries(sum(part.num_rows for part in parts), num_heads, head_dim)
    found = attended([part.span() for part in parts], q, window, exact)
    assert_follows_the_formula(found, parts, q, window, product)
    chosen = data.draw(st.integers(0, len(parts) - 1))
    row = data.draw(st.integers(0, parts[chosen].num_rows - 1))
    at = sum(part.num_rows for part in parts[:chosen]) + row
    assert same_bits(attended([parts[chosen].span(row, row + 1)], q[at : at + 1], window, exact), found[at : at + 1])


def test_no_rows_are_no_launch() -> None:
    attend(
        step_of([]), torch.empty(0, 2, 8, device=DEVICE), 0, Seen(None, 1.0, None), torch.empty(0, 2, 8, device=DEVICE)
    )


def test_heads_pages_and_windows_that_do_not_fit_are_refused() -> None:
    step = step_of([RowSpan(2, 0, nan_pages(new_pool(2, 8), 2))])
    q = torch.zeros(2, 4, 8, device=DEVICE)
    cases = [
        (q[:1], q[:1], 0, None),
        (q[:, :3], q[:, :3], 0, None),
        (q[..., :7], q[..., :7], 0, None),
        (q, q[:, :2], 0, None),
        (q, q, INSTANCES, None),
        (q, q, 0, 0),
    ]
    for given_q, out, instance, window in cases:
        with pytest.raises(ShapeError, match="do not fit 2 rows and pages of 2 instances, 2 heads of 8"):
            attend(step, given_q, instance, Seen(window, 1.0, None), out)
    with pytest.raises(ShapeError, match="attend: out must be float32"):
        attend(step, q, 0, Seen(None, 1.0, None), q.double())
    with pytest.raises(ShapeError, match="attend: q must be float32 with the"):
        attend(step, torch.zeros(2, 8, 8, device=DEVICE)[:, ::2], 0, Seen(None, 1.0, None), q)
