"""Keys and values in codes: what is written to the pages, and attention over them, on every instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from cpu_pages import BITS
from kernel_support import ISAS, every_isa, same_bits
from paged_attention import PagedAttention
from ropewalk import native
from ropewalk.backends.reference.codes import encode, hadamard
from ropewalk.config.cache_format import CacheFormat, is_rotated

DIMS = (16, 48, 64, 80, 96, 128, 256)
TEXTS = ("q8", "q6", "q4", "q8_q4", "fp16_q8", "q6_fp32")
every_bits = pytest.mark.parametrize("kind", BITS)


def heads_of(num_rows: int, num_heads: int, dim: int, seed: int, outlier: float = 6) -> torch.Tensor:
    """Normal numbers with a mean, and one dim that stands out as in the keys of real models."""
    x = torch.randn(num_rows, num_heads, dim, generator=torch.Generator().manual_seed(seed))
    x[..., dim // 3] *= outlier
    return x + 0.2


def coded(x: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [Hkv, T, P] and scales of rows [T, Hkv, D] as the reference backend makes them."""
    codes, scales = encode(hadamard(x) if BITS[kind] < 8 else x, BITS[kind])
    return codes.transpose(0, 1).numpy(), scales.transpose(0, 1).numpy()


def visible(num_rows: int, start: int, num_keys: int, window: int | None) -> np.ndarray:
    """[T, S]"""
    rows, keys = np.arange(start, start + num_rows)[:, None], np.arange(num_keys)[None, :]
    return (keys <= rows) & (keys > rows - (window or num_keys + 1))


def seen(cache: PagedAttention, start: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [T, Hkv, S, D] float64 as each row is to see them: the recent pages in float16."""
    keys, values = (np.repeat(part[None], num_rows, axis=0) for part in cache.numbers())
    if cache.recent:
        exact = cache.numbers(recent=True)
        for row in range(num_rows):
            first = 64 * cache.format.first_exact_page(start + row)
            keys[row, :, first:], values[row, :, first:] = (part[:, first:] for part in exact)
    return keys, values


def peer(q: torch.Tensor, keys: np.ndarray, values: np.ndarray, mask: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """scaled_dot_product_attention of torch, row by row over the keys that it sees: [T, Hq, D]."""
    out = []
    for row, shown in enumerate(mask):
        k, v = (torch.from_numpy(part[row][:, shown]).to(dtype)[None] for part in (keys, values))  # [1, Hkv, S, D]
        y = torch.nn.functional.scaled_dot_product_attention(q[row].to(dtype)[None, :, None], k, v, enable_gqa=True)
        out.append(y[0, :, 0])
    return torch.stack(out)


def plain_peer(cache: PagedAttention, q: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """The same in float32, over codes that stay rotated: queries are turned, and the result is turned back."""
    keys, values = (np.broadcast_to(part, (len(q), *part.shape)) for part in cache.numbers("coded"))
    y = peer(hadamard(q) if is_rotated(cache.format.keys) else q, keys, values, mask, torch.float32)
    return hadamard(y) if is_rotated(cache.format.values) else y


@every_isa
@every_bits
@pytest.mark.parametrize("dim", DIMS)
def test_pages_hold_the_codes_of_the_reference_backend(isa, kind, dim):
    cache = PagedAttention(kind, (2, 2, dim), isa=isa, threads=2)
    k, v, q = (heads_of(150, 2, dim, seed) for seed in (1, 2, 3))
    k[3], v[70], k[5] = 0, 0, 1e-8
    for low, high in ((0, 1), (1, 70), (70, 150)):
        cache.run(q[low:high], k[low:high], v[low:high], low)
    for part, rows in enumerate((k, v)):
        codes, scales = coded(rows, kind)
        found = [pair[part] for pair in cache.halves()]
        assert np.array_equal(np.concatenate([half.codes for half in found], 1)[:, :150], codes)
        assert np.array_equal(np.concatenate([half.scales for half in found], 1)[:, :150], scales)


# T, start, Hq, Hkv, window
SHAPES = {
    "one-token": (1, 130, 2, 2, None),
    "group-2-at-a-page-border": (3, 126, 4, 2, None),
    "group-8": (9, 55, 8, 1, None),
    "prompt": (130, 0, 2, 1, None),
    "window": (70, 60, 4, 2, 50),
    "window-over-pages": (20, 170, 3, 3, 100),
    "one-token-over-ranges": (1, 530, 8, 1, None),
}


def attended(text: str, isa: str, compute: str, dim: int, shape: str, seed: int):
    """(cache, queries, the result of the last rows, their start, the mask)."""
    num_rows, start, num_heads, num_kv_heads, window = SHAPES[shape]
    cache = PagedAttention(text, (num_heads, num_kv_heads, dim), isa=isa, compute=compute, window=window, threads=2)
    k, v = (heads_of(start + num_rows, num_kv_heads, dim, 3 * seed + part, 1) for part in (1, 2))
    q = heads_of(start + num_rows, num_heads, dim, 3 * seed, 1)
    if start:
        cache.run(q[:start], k[:start], v[:start], 0)
    y = cache.run(q[start:], k[start:], v[start:], start)
    return cache, q[start:], y, start, visible(num_rows, start, 64 * len(cache.pages), window)


@every_isa
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_attention_over_codes_is_as_accurate_as_torch_over_what_they_read(isa, text, shape):
    results, exact, plain = [], [], []
    for seed in range(min(12, -(-64 // SHAPES[shape][0]))):  # the errors of a few rows are a matter of chance
        cache, q, y, start, mask = attended(text, isa, "exact", 48, shape, seed)
        keys, values = seen(cache, start, len(q))
        results.append(y)
        exact.append(peer(q, keys, values, mask, torch.float64))
        plain.append(plain_peer(cache, q, mask))
    assert_as_accurate(torch.cat(results), torch.cat(exact).flatten(1), torch.cat(plain).flatten(1))


def rounded_queries(q: torch.Tensor, kind: str) -> torch.Tensor:
    """Queries times 1 / sqrt(D), rounded to 1 / 127 of the largest of 32 dims as in "int8"; [T, Hq, D] float64.

    Turned back where they are rotated, so that they go with keys that are turned back as well.
    """
    dim = q.shape[-1]
    scaled = q * np.float32(1.0 / math.sqrt(dim))
    turned = hadamard(scaled) if BITS[kind] < 8 else scaled
    blocks = torch.nn.functional.pad(turned, (0, -dim % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    steps = (blocks * (127.0 / largest)).round().double() * (largest / 127.0).double()
    steps = steps.flatten(-2)[..., :dim]
    return hadamard(steps) if BITS[kind] < 8 else steps


def weight_bound(weights: np.ndarray, cache: PagedAttention, mask: np.ndarray) -> np.ndarray:
    """What rounding weights to 15 bits can change: [T, Hq, P] for outputs that are still rotated.

    Three roundings of half a step, of which 32767 are the largest weight of a page times the largest scale: at most
    2^-14 of that for every key, times its code. weights: [T, Hq, S] of all keys.
    """
    group = weights.shape[1] // cache.heads[1]
    bound = 0.0
    for page, (_, half) in enumerate(cache.halves()):
        places = slice(64 * page, 64 * page + 64)
        shown = mask[:, places]
        with np.errstate(invalid="ignore"):
            scales = np.where(shown[:, None, :, None], half.scales[None].astype(float), 0)  # [T, Hkv, 64, P/32]
        largest = scales.max(2)[:, :, None].repeat(group, 1)[:, :, 0].repeat(32, -1)  # [T, Hq, P]
        codes = np.abs(half.codes.astype(float) - (2 ** BITS[cache.format.values] - 1) / 2)  # [Hkv, 64, P]
        sums = np.einsum("ts,hsd->thd", shown.astype(float), codes).repeat(group, 1)  # [T, Hq, P]
        bound = bound + weights[:, :, places].max(2)[:, :, None] * largest * sums * 2.0**-14
    return bound


@every_isa
@pytest.mark.parametrize("text", ["q8", "q6", "q4", "q8_q4", "q4_q8"])
@pytest.mark.parametrize(
    "dim, shape", [(dim, ("group-2-at-a-page-border", "group-8", "window")[i % 3]) for i, dim in enumerate(DIMS)]
)
def test_attention_in_integers_is_that_of_rounded_queries_within_the_rounding_of_weights(isa, text, dim, shape):
    cache, q, y, start, mask = attended(text, isa, "int8", dim, shape, 0)
    keys, values = seen(cache, start, len(q))
    group = q.shape[1] // keys.shape[1]
    rounded = rounded_queries(q, cache.format.keys).numpy()
    scores = np.einsum("thd,thsd->ths", rounded, np.nan_to_num(keys).repeat(group, 1))
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    shown = np.where(mask[:, None, :, None], values.repeat(group, 1), 0)
    exact = np.einsum("ths,thsd->thd", weights, shown)
    bound = weight_bound(weights, cache, mask)
    if cache.format.values != "q8":  # a piece of the head shares what its dims were rounded by
        size = dim & -dim
        pieces = bound[..., :dim].reshape(*bound.shape[:2], -1, size).sum(-1, keepdims=True) / math.sqrt(size)
        bound = np.repeat(pieces, size, axis=-1).reshape(*bound.shape[:2], dim)
    error = np.abs(y.view(exact.shape).double().numpy() - exact)
    assert (error <= bound[..., :dim] + 1e-4 * np.abs(shown).max()).all()  # and the rounding of float32 scores
    assert error.max() < 2e-3 * np.abs(exact).max() + 1e-3


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("text", ["q8", "q6", "q4", "fp16_q4", "q8_q4+64"])
@pytest.mark.parametrize("heads, window", [((4, 4, 20), None), ((8, 1, 64), 100)])
def test_results_are_the_same_bits_for_any_chunks_threads_and_leftovers(isa, compute, text, heads, window):
    num_rows = 700
    k, v = (heads_of(num_rows, heads[1], heads[2], seed) for seed in (1, 2))
    q = heads_of(num_rows, heads[0], heads[2], 3)
    whole = PagedAttention(text, heads, isa=isa, compute=compute, window=window, fill=0).run(q, k, v, 0)
    assert whole.isfinite().all()
    for threads, fill, chunks in ((3, 255, (511, 1, 1, 63, 2, 70, 52)), (1, 126, (64, 7, 1, 500, 1, 127))):
        cache = PagedAttention(text, heads, isa=isa, compute=compute, window=window, threads=threads, fill=fill)
        parts, start = [], 0
        for chunk in chunks:
            rows = slice(start, start + chunk)
            parts.append(cache.run(q[rows], k[rows], v[rows], start))
            start += chunk
        assert start == num_rows and same_bits(torch.cat(parts), whole)


@every_isa
@pytest.mark.parametrize("text", ["q8+64", "q6+128", "q8_q4+64", "fp16_q4+192"])
@pytest.mark.parametrize("window", [None, 150])
def test_each_row_reads_its_last_pages_in_float16(isa, text, window):
    cache = PagedAttention(text, (4, 2, 48), isa=isa, compute="exact", window=window)
    k, v, q = (heads_of(330, count, 48, seed, 1) for seed, count in enumerate((2, 2, 4)))
    y = cache.run(q, k, v, 0)
    keys, values = seen(cache, 0, 330)
    mask = visible(330, 0, 64 * len(cache.pages), window)
    exact, plain = (peer(q, keys, values, mask, dtype).flatten(1) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(y, exact, plain)


@every_isa
@pytest.mark.parametrize("text", ["q8", "q4", "q4+64"])
def test_layer_instances_keep_their_own_keys_and_values(isa, text):
    heads = (2, 1, 32)
    both = PagedAttention(text, heads, isa=isa, instances=2)
    inputs = [[heads_of(90, count, 32, 10 * part + i) for i, count in enumerate((2, 1, 1))] for part in (0, 1)]
    found = [both.run(*inputs[i], 0, instance=i) for i in (0, 1)]
    for i in (0, 1):
        assert same_bits(found[i], PagedAttention(text, heads, isa=isa).run(*inputs[i], 0))


every_cache = pytest.mark.parametrize("kind", ["q8", "q6", "q4", "f16_q8", "q4_f32"])


def kernel_cache(isa: str, k: torch.Tensor, v: torch.Tensor, kind: str) -> native.KvCache:
    cache = native.KvCache(native.Runtime(isa, 2), k.shape[1], k.shape[2], len(k), kind)
    cache.append_(k, v, 0)
    return cache


@every_isa
@every_cache
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_rows_that_see_it_and_in_no_other(isa, kind, compute, place, value):
    given = {"q": heads_of(90, 4, 64, 1) * 0.3, "k": heads_of(90, 2, 64, 2), "v": heads_of(90, 2, 64, 3)}
    q, k, v = given.values()
    clean = kernel_cache(isa, k, v, kind).attend(q, 0, None, compute).view(90, 4, 64)
    given[place][70, 1, 3] = value
    y = kernel_cache(isa, k, v, kind).attend(q, 0, None, compute).view(90, 4, 64)
    assert same_bits(y[:70], clean[:70])
    if place == "q":
        assert not y[70, 1].isfinite().any() and same_bits(y[71:], clean[71:]) and same_bits(y[:, 2:], clean[:, 2:])
    elif place == "v":
        assert not y[70:, 2:, 3].isfinite().any() and same_bits(y[:, :2], clean[:, :2])
    elif math.isnan(value) or not kind.startswith("f"):  # minus infinity times a float is a score that hides a key
        assert not y[70:, 2:].isfinite().any() and same_bits(y[:, :2], clean[:, :2])


@every_isa
@every_cache
def test_what_an_earlier_conversation_left_behind_does_not_show(isa, kind):
    k, v, q = heads_of(100, 2, 48, 1), heads_of(100, 2, 48, 2), heads_of(70, 2, 48, 3)
    stale = kernel_cache(isa, torch.full_like(k, math.nan), torch.full_like(v, math.inf), kind)
    fresh = kernel_cache(isa, k, v, kind)
    stale.append_(k[:70], v[:70], 0)
    assert same_bits(stale.attend(q, 0), fresh.attend(q, 0))


@settings(max_examples=30, deadline=None)
@given(
    text=st.sampled_from(["q8", "q6", "q4", "q6_q8", "fp32_q6", "q4+64"]),
    isa=st.sampled_from(ISAS),
    heads=st.sampled_from([(1, 1, 16), (2, 1, 40), (3, 3, 80), (8, 1, 32), (5, 1, 7)]),
    window=st.none() | st.integers(1, 200),
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
)
def test_any_chunks_of_any_sizes_give_the_rows_of_one_step(text, isa, heads, window, chunks, scale):
    num_rows = sum(chunks)
    q, k, v = (heads_of(num_rows, count, heads[2], i) for i, count in enumerate((heads[0], heads[1], heads[1])))
    v = v * scale
    whole = PagedAttention(text, heads, isa=isa, window=window).run(q, k, v, 0)
    cache = PagedAttention(text, heads, isa=isa, window=window, fill=255)
    parts, start = [], 0
    for chunk in chunks:
        parts.append(cache.run(q[start : start + chunk], k[start : start + chunk], v[start : start + chunk], start))
        start += chunk
    assert same_bits(torch.cat(parts), whole)
    # A row is a mean of values: it stays among those that it is made of, but for what the 14 bits of the weights of the
    # 64 values of a page may add up to, which turning back spreads over the dims of a block.
    largest = np.abs(np.concatenate(cache.numbers()[1][:, :num_rows])).max()
    rounding = 64 * 2.0**-15 * math.sqrt(heads[2] & -heads[2])
    assert whole.abs().max() <= (1.01 + rounding) * largest + 1e-30


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(list(BITS)),
    isa=st.sampled_from(ISAS),
    dim=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-7, 1e-3, 1.0, 1e4]),
)
def test_what_is_written_reads_within_half_a_step(kind, isa, dim, seed, scale):
    k, v = (heads_of(67, 1, dim, seed + part) * scale for part in (0, 1))
    cache = PagedAttention(kind, (1, 1, dim), isa=isa)
    cache.run(torch.zeros(67, 1, dim), k, v, 0)
    for part, rows in enumerate((k, v)):
        codes, scales = coded(rows, kind)
        found = [pair[part] for pair in cache.halves()]
        assert np.array_equal(np.concatenate([half.codes for half in found], 1)[:, :67], codes)
        half_steps = np.abs(scales.astype(float)).max(-1) / 2 * (1 if kind == "q8" else math.sqrt(dim & -dim))
        error = np.abs(np.concatenate([half.numbers for half in found], 1)[:, :67] - rows.transpose(0, 1).numpy())
        # A scale is rounded to float16 too, to a multiple of 2^-24 where it is small.
        assert (error.max(-1) <= 1.02 * half_steps + 300 * 2.0**-24 * math.sqrt(dim & -dim)).all()


def test_the_spelling_of_a_format_is_that_of_its_cache():
    for text in TEXTS:
        cache = PagedAttention(text, (2, 2, 64))
        position = CacheFormat.parse(text).position_bytes(2, 64)
        assert cache.pool.page_bytes(3) == 3 * 64 * position  # 64 dims need no padding
        assert cache.pool.layout == f"cpu-1 {text} heads=2 dim=64"
