"""The key/value cache and attention over it, on every instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from kernel_support import every_isa, same_bits
from ropewalk import native

KINDS = ("f16", "f32")
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_heads(num_rows: int, num_heads: int, head_dim: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, num_heads, head_dim, generator=torch.Generator().manual_seed(seed))


def filled_cache(isa: str, k, v, kind: str = "f32", threads: int = 1, capacity: int | None = None) -> native.KvCache:
    num_rows, num_heads, head_dim = k.shape
    cache = native.KvCache(native.Runtime(isa, threads), num_heads, head_dim, capacity or num_rows, kind)
    cache.append_(k, v, 0)
    return cache


def attention(q, k, v, start: int, window: int | None) -> torch.Tensor:
    """The formula in the dtype of its arguments, all scores at once; q: [T, Hq, D], k, v: [S, Hkv, D] -> [T, Hq*D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (array.repeat_interleave(group, 1) for array in (k, v))  # [S, Hq, D]
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[2])
    query, key = torch.arange(start, start + len(q))[:, None], torch.arange(len(k))[None, :]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)


# T new tokens at `start`, query heads, key/value heads, head size, window
SHAPES = {
    "first-token": (1, 0, 1, 1, 1, None),
    "one-token": (1, 200, 4, 2, 64, None),
    "prompt": (70, 0, 4, 4, 20, None),
    "gqa-7": (9, 61, 14, 2, 64, None),
    "gqa-8-d128": (33, 130, 8, 1, 128, None),
    "mha-d80": (65, 64, 3, 3, 80, None),
    "mha-d96": (5, 251, 2, 2, 96, None),
    "long-chunk": (130, 0, 2, 1, 32, None),
    "window-1": (20, 90, 2, 1, 16, 1),
    "window-inside-a-tile": (80, 100, 4, 2, 20, 17),
    "window-over-tiles": (100, 150, 2, 2, 64, 100),
    "window-longer-than-all": (50, 50, 7, 1, 48, 1000),
    "one-token-over-ranges-of-keys": (1, 1600, 8, 2, 64, None),
    "prompt-over-ranges-of-keys": (90, 990, 2, 1, 32, None),
    "window-over-ranges-of-keys": (40, 1500, 4, 2, 64, 700),
}


@every_isa
@every_kind
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_as_accurate_as_float32(isa, kind, name):
    num_rows, start, num_heads, num_kv_heads, head_dim, window = SHAPES[name]
    results, exact, plain = [], [], []
    for seed in range(-(-64 // num_rows)):  # the errors of a few rows are a matter of chance
        q = random_heads(num_rows, num_heads, head_dim, 3 * seed + 1) * 3
        k, v = (random_heads(start + num_rows, num_kv_heads, head_dim, 3 * seed + part) for part in (2, 3))
        results.append(filled_cache(isa, k, v, kind, threads=2).attend(q, start, window, "exact"))
        if kind == "f16":
            k, v = k.half().float(), v.half().float()
        exact.append(attention(q.double(), k.double(), v.double(), start, window))
        plain.append(attention(q, k, v, start, window))
    assert_as_accurate(torch.cat(results), torch.cat(exact), torch.cat(plain))


def attention_in_bf16(q, k, v, start: int, window: int | None) -> torch.Tensor:
    """The formula with all that is multiplied rounded to bf16, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (array.bfloat16().double() for array in (q / math.sqrt(q.shape[2]), k, v))
    k, v = (array.repeat_interleave(group, 1) for array in (k, v))  # [S, Hq, D]
    scores = torch.einsum("thd,shd->hts", q, k)
    query, key = torch.arange(start, start + len(q))[:, None], torch.arange(len(k))[None, :]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    sums = weights.sum(-1, keepdim=True).transpose(0, 1)  # [T, Hq, 1]
    out = torch.einsum("hts,shd->thd", weights.bfloat16().double(), v) / sums
    return out.reshape(len(q), -1)


@every_isa
@pytest.mark.parametrize("name", SHAPES)
def test_int8_attention_over_halves_is_as_accurate_as_bf16(isa, name):
    num_rows, start, num_heads, num_kv_heads, head_dim, window = SHAPES[name]
    results, exact, plain = [], [], []
    for seed in range(-(-64 // num_rows)):
        q = random_heads(num_rows, num_heads, head_dim, 3 * seed + 1) * 3
        k, v = (random_heads(start + num_rows, num_kv_heads, head_dim, 3 * seed + part) for part in (2, 3))
        results.append(filled_cache(isa, k, v, "f16", threads=2).attend(q, start, window, "int8"))
        k, v = k.half().float(), v.half().float()
        exact.append(attention(q.double(), k.double(), v.double(), start, window))
        plain.append(attention_in_bf16(q, k, v, start, window))
    assert_as_accurate(torch.cat(results), torch.cat(exact), torch.cat(plain))


@every_isa
def test_int8_attention_rounds_halves_where_the_processor_multiplies_bf16_alone(isa):
    q, k, v = random_heads(70, 4, 64, 1), random_heads(90, 2, 64, 2), random_heads(90, 2, 64, 3)
    for kind in KINDS:
        cache = filled_cache(isa, k, v, kind)
        rounds = isa == "avx512bf16" and kind == "f16"
        assert same_bits(cache.attend(q, 20, None, "int8"), cache.attend(q, 20, None, "exact")) != rounds


@every_isa
@pytest.mark.parametrize("num_heads, num_kv_heads, start", [(4, 4, 0), (8, 2, 37), (7, 1, 128)])
def test_attention_is_as_accurate_as_torch_scaled_dot_product_attention(isa, num_heads, num_kv_heads, start):
    q = random_heads(50, num_heads, 64, 1)
    k, v = (random_heads(start + 50, num_kv_heads, 64, seed) for seed in (2, 3))
    mask = torch.arange(start + 50)[None, :] <= torch.arange(start, start + 50)[:, None]  # [T, S]

    def peer(*heads: torch.Tensor) -> torch.Tensor:
        q, k, v = (array.transpose(0, 1)[None] for array in heads)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y[0].transpose(0, 1).reshape(50, -1)

    assert_as_accurate(
        filled_cache(isa, k, v).attend(q, start), peer(q.double(), k.double(), v.double()), peer(q, k, v)
    )


@every_isa
@every_kind
@pytest.mark.parametrize("window", [None, 4096])
def test_the_last_of_131072_positions_is_right(isa, kind, window):
    num_keys = 131072
    q = random_heads(2, 2, 16, 1) * 2
    k, v = (random_heads(num_keys, 1, 16, seed).half().float() for seed in (2, 3))
    y = filled_cache(isa, k, v, kind).attend(q, num_keys - 2, window, "exact")
    exact = attention(q.double(), k.double(), v.double(), num_keys - 2, window)
    assert_as_accurate(y, exact, attention(q, k, v, num_keys - 2, window))


@every_isa
def test_scores_far_apart_do_not_overflow(isa):
    k, v = random_heads(150, 1, 16, 2) * 40, random_heads(150, 1, 16, 3)
    q = random_heads(4, 1, 16, 1) * 100
    y = filled_cache(isa, k, v).attend(q, 146)
    exact = attention(q.double(), k.double(), v.double(), 146, None)
    assert_as_accurate(y, exact, attention(q, k, v, 146, None))


@every_isa
@every_kind
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(4, 4, 20), (14, 2, 64), (2, 2, 33)])
def test_results_are_the_same_bits_for_any_chunks_and_threads(isa, kind, window, num_heads, num_kv_heads, head_dim):
    num_rows = 180
    q = random_heads(num_rows, num_heads, head_dim, 1)
    k, v = (random_heads(num_rows, num_kv_heads, head_dim, seed) for seed in (2, 3))
    whole = filled_cache(isa, k, v, kind).attend(q, 0, window)
    for threads in (2, 3, 4):
        assert same_bits(filled_cache(isa, k, v, kind, threads).attend(q, 0, window), whole)
    for chunk in (1, 7, 64, 150):
        cache = native.KvCache(native.Runtime(isa, 2), num_kv_heads, head_dim, num_rows, kind)
        parts = []
        for start in range(0, num_rows, chunk):
            cache.append_(k[start : start + chunk], v[start : start + chunk], start)
            parts.append(cache.attend(q[start : start + chunk], start, window))
        assert same_bits(torch.cat(parts), whole)


@every_isa
@every_kind
@pytest.mark.parametrize("window", [None, 100, 700])
def test_rows_over_many_ranges_of_keys_are_the_same_bits_for_any_chunks_and_threads(isa, kind, window):
    num_rows = 1700
    q = random_heads(num_rows, 4, 20, 1)
    k, v = (random_heads(num_rows, 2, 20, seed) for seed in (2, 3))
    whole = filled_cache(isa, k, v, kind).attend(q, 0, window)
    cache = native.KvCache(native.Runtime(isa, 3), 2, 20, num_rows, kind)
    parts, start = [], 0
    for chunk in (511, 1, 1, 1, 600, 16, 7, 463, 1, 99):
        cache.append_(k[start : start + chunk], v[start : start + chunk], start)
        parts.append(cache.attend(q[start : start + chunk], start, window))
        start += chunk
    assert start == num_rows and same_bits(torch.cat(parts), whole)


@every_isa
def test_what_an_earlier_conversation_left_behind_does_not_show(isa):
    k, v = (random_heads(100, 2, 20, seed) for seed in (2, 3))
    stale = filled_cache(isa, torch.full_like(k, float("nan")), torch.full_like(v, float("inf")), capacity=128)
    fresh = filled_cache(isa, k[:70], v[:70], capacity=128)
    stale.append_(k[:70], v[:70], 0)
    q = random_heads(70, 2, 20, 1)
    assert same_bits(stale.attend(q, 0), fresh.attend(q, 0))


@every_isa
def test_a_half_cache_computes_as_a_float_cache_of_rounded_values(isa):
    k, v = (random_heads(90, 2, 20, seed) for seed in (2, 3))
    for num_rows in (1, 5, 40):
        q = random_heads(num_rows, 4, 20, 1)
        halves = filled_cache(isa, k, v, "f16").attend(q, 90 - num_rows, None, "exact")
        floats = filled_cache(isa, k.half().float(), v.half().float(), "f32").attend(q, 90 - num_rows)
        assert same_bits(halves, floats)


def stored_halves(isa: str, values: np.ndarray) -> np.ndarray:
    """What an f16 cache keeps of float32 values: a single visible key has weight 1."""
    rows = values.reshape(-1, 1, 4096)
    out = []
    for row in rows:
        cache = native.KvCache(native.Runtime(isa, 1), 1, 4096, 1, "f16")
        cache.append_(np.zeros((1, 1, 4096), np.float32), row[None], 0)
        out.append(cache.attend(np.zeros((1, 1, 4096), np.float32), 0, None, "exact")[0])
    return np.concatenate(out)


@every_isa
def test_halves_are_stored_rounded_to_nearest_even(isa):
    """Every half, every midpoint of two neighbours, both sides of each, and what lies beyond the largest half."""
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    beyond = np.array([65504, 65519.996, 65520, 65536, 1e10, 3.4e38, np.inf, 1e-8, 2.9802322e-8, 2.98e-8, 1e-45, 0])
    points = np.concatenate([halves, middles, beyond.astype(np.float32)])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    points = np.concatenate([points, -points])
    padded = np.resize(points.astype(np.float32), -(-len(points) // 4096) * 4096)
    with np.errstate(over="ignore"):
        expected = padded.astype(np.float16).astype(np.float32)
    assert np.array_equal(stored_halves(isa, padded), expected)


@every_isa
@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("start", [0, 5, 100])
def test_a_non_finite_query_leaves_no_finite_number_in_its_head(isa, kind, value, start):
    k, v = (random_heads(start + 3, 1, 20, seed).abs() for seed in (2, 3))
    q = random_heads(3, 2, 20, 1)
    cache = filled_cache(isa, k, v, kind)
    clean = cache.attend(q, start)
    q[1, 0, 17] = value
    y = cache.attend(q, start)
    assert not torch.isfinite(y[1, :20]).any()
    assert same_bits(y[1, 20:], clean[1, 20:]) and same_bits(y[[0, 2]], clean[[0, 2]])


@every_isa
@every_kind
@pytest.mark.parametrize("place", ["k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("window", [None, 8])
def test_a_non_finite_key_or_value_shows_in_the_rows_that_see_it_and_in_no_other(isa, kind, place, value, window):
    """1e6 is infinite in an f16 cache alone."""
    finite = math.isfinite(value) and kind == "f32"
    q = random_heads(90, 14, 20, 1).abs() * 0.1
    k, v = (random_heads(90, 2, 20, seed) * 0.1 for seed in (2, 3))
    clean = filled_cache(isa, k, v, kind).attend(q, 0, window).view(90, 14, 20)
    (k if place == "k" else v)[70, 1, 3] = value
    y = filled_cache(isa, k, v, kind).attend(q, 0, window).view(90, 14, 20)
    last = 90 if window is None else 70 + window
    assert same_bits(y[:70], clean[:70]) and same_bits(y[last:], clean[last:])
    assert same_bits(y[:, :7], clean[:, :7])
    seen = y[70:last, 7:] if place == "k" else y[70:last, 7:, 3]
    assert torch.isfinite(seen).all() if finite else not torch.isfinite(seen).any()


@every_isa
@every_kind
def test_rows_may_lie_any_distance_apart(isa, kind):
    fused = torch.randn(40, (4 + 2 + 2) * 20, generator=torch.Generator().manual_seed(0))
    q, k, v = (part.unflatten(1, (-1, 20)) for part in fused.split([80, 40, 40], dim=1))
    strided = filled_cache(isa, k, v, kind).attend(q, 0)
    assert same_bits(strided, filled_cache(isa, k.contiguous(), v.contiguous(), kind).attend(q.contiguous(), 0))


@every_isa
def test_no_rows_are_appended_and_attended(isa):
    cache = filled_cache(isa, random_heads(5, 1, 16, 0), random_heads(5, 1, 16, 1))
    cache.append_(np.empty((0, 1, 16), np.float32), np.empty((0, 1, 16), np.float32), 5)
    assert cache.attend(np.empty((0, 2, 16), np.float32), 5).shape == (0, 32)
    assert isinstance(cache.attend(torch.empty(0, 2, 16), 5), torch.Tensor)


@every_kind
def test_memory_is_that_of_keys_and_values_in_whole_tiles(kind):
    cache = native.KvCache(native.Runtime("scalar", 1), 3, 20, 65, kind)
    assert cache.capacity == 65
    assert cache.num_bytes == 3 * 128 * (20 + 32) * (2 if kind == "f16" else 4)
