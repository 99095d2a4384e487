"""The kernels of other families than Llama's: layer norm, activations and their gates, soft caps, routes of experts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from kernel_support import every_isa, same_bits, spread_rows
from ropewalk import native
from ropewalk.base.errors import ShapeError

FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_formula(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return normed if bias is None else normed + bias


@every_isa
@pytest.mark.parametrize("size", (1, 15, 16, 20, 96, 333))
@pytest.mark.parametrize("heads, per_head", [(None, False), (3, False), (3, True)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm_is_as_accurate_as_float32(isa, size, heads, per_head, with_bias):
    x = normal(*((5, size) if heads is None else (5, heads, size))) * 30 + 10
    shape = (heads, size) if per_head else (size,)
    weight, bias = normal(*shape, seed=1), normal(*shape, seed=2) if with_bias else None
    y = native.layer_norm(native.Runtime(isa, 2), x, weight, bias, 1e-5)
    exact = norm_formula(x.double(), weight.double(), None if bias is None else bias.double(), 1e-5)
    assert_as_accurate(y, exact, norm_formula(x, weight, bias, 1e-5))


@every_isa
def test_rows_of_a_layer_norm_may_lie_any_distance_apart(isa):
    runtime, weight = native.Runtime(isa, 1), normal(2, 20, seed=1).numpy()
    x = normal(6, 2, 20).numpy()
    together = native.layer_norm(runtime, x, weight, None, 1e-6)
    assert same_bits(native.layer_norm(runtime, spread_rows(x), weight, None, 1e-6), together)


@every_isa
@every_function
@pytest.mark.parametrize("size", (1, 15, 16, 333))
def test_activations_and_gates_are_as_accurate_as_float32(isa, name, size):
    runtime, function, x = native.Runtime(isa, 2), FUNCTIONS[name], normal(6, 2 * size) * 4
    assert_as_accurate(native.activate(runtime, x, name), function(x.double()), function(x))
    plain, exact = (function(a[:, :size]) * a[:, size:] for a in (x, x.double()))
    assert_as_accurate(native.gate(runtime, x, name), exact, plain)


@every_isa
@every_function
def test_activations_hold_over_the_whole_range(isa, name):
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, -88.5, -40.0, 0.0, 1e-30, 88.5, 1e4, 1e30])])
    y = native.activate(native.Runtime(isa, 1), x[None], name)[0]
    exact, plain = FUNCTIONS[name](x.double()), FUNCTIONS[name](x)
    if name == "gelu_tanh":  # torch computes 1 + tanh, which leaves no digit of the far end even in float64
        u = math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
        exact = x.double() / (1 + torch.exp(-2 * u))
    for low, high in ((-1e5, -8), (-8, -1), (-1, 1), (1, 30), (30, 1e5), (1e5, 1e31)):  # each of its own magnitude
        inside = (x >= low) & (x <= high)
        assert_as_accurate(y[inside], exact[inside], plain[inside])


@every_isa
@every_function
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_shows_in_its_element_and_in_no_other(isa, name, value):
    runtime, x = native.Runtime(isa, 1), normal(2, 40)
    clean = native.activate(runtime, x, name)
    x[1, 7] = value
    y = native.activate(runtime, x, name)
    assert not torch.isfinite(y[1, 7])
    y[1, 7] = clean[1, 7]
    assert same_bits(y, clean)


@every_isa
@every_function
def test_rows_give_the_same_bits_with_any_neighbours_and_threads(isa, name):
    x, weight = normal(37, 4100), normal(4100, seed=1)
    operations = {
        "norm": lambda runtime, rows: native.layer_norm(runtime, x[rows], weight, weight, 1e-6),
        "activate": lambda runtime, rows: native.activate(runtime, x[rows], name),
        "gate": lambda runtime, rows: native.gate(runtime, x[rows], name),
    }
    for operation in operations.values():
        whole = operation(native.Runtime(isa, 1), slice(None))
        assert same_bits(operation(native.Runtime(isa, 3), slice(None)), whole)
        runtime = native.Runtime(isa, 2)
        assert same_bits(torch.cat([operation(runtime, slice(t, t + 5)) for t in range(0, 37, 5)]), whole)


def attention(q, k, v, start, scale, softcap, window):
    """q: [T, Hq, D], k, v: [S, Hkv, D] -> [T, Hq * D] in their dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(group, 1) for part in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    rows, keys = torch.arange(start, start + len(q))[:, None], torch.arange(len(k))
    hidden = (keys > rows) | (keys <= rows - window if window else False)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


@every_isa
@pytest.mark.parametrize("softcap", [None, 0.5, 50.0])
@pytest.mark.parametrize("scale", [None, 1.0, 0.01])
@pytest.mark.parametrize("num_rows, start", [(1, 700), (90, 0), (30, 100)])
def test_scores_are_scaled_and_capped_before_the_mask(isa, softcap, scale, num_rows, start):
    length, head_dim = start + num_rows, 24
    k, v, q = normal(length, 2, head_dim), normal(length, 2, head_dim, seed=1), normal(num_rows, 4, head_dim, seed=2)
    cache = native.KvCache(native.Runtime(isa, 2), 2, head_dim, length, "f32")
    cache.append_(k, v, 0)
    used = head_dim**-0.5 if scale is None else scale
    for window in (None, 40):
        y = cache.attend(q, start, window, scale=scale, softcap=softcap)
        exact = attention(q.double(), k.double(), v.double(), start, used, softcap, window)
        assert_as_accurate(y, exact, attention(q, k, v, start, used, softcap, window))


@every_isa
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("dtype", ["q8", "q4", "f16"])
def test_a_soft_cap_over_any_cache_bounds_the_scores(isa, dtype, compute):
    """Against the same cache without one: scores that the cap hardly bends, and scores that it makes all alike."""
    k, v, q = normal(130, 2, 32), normal(130, 2, 32, seed=1), normal(5, 4, 32, seed=2)
    cache = native.KvCache(native.Runtime(isa, 2), 2, 32, 130, dtype)
    cache.append_(k, v, 0)
    plain = cache.attend(q, 125, None, compute)
    assert (cache.attend(q, 125, None, compute, softcap=3e3) - plain).abs().max() < 1e-3
    alike = cache.attend(q, 125, None, compute, softcap=1e-4)
    step = {"f16": 1e-3, "q8": 2e-2, "q4": 0.2}[dtype]
    means = torch.stack([v[: 126 + t].mean(0) for t in range(5)]).repeat_interleave(2, 1).flatten(1)  # [T, Hq * D]
    assert (alike - means).abs().max() < step
    whole = cache.attend(q, 125, None, compute, softcap=2.0)
    apart = torch.cat([cache.attend(q[t : t + 1], 125 + t, None, compute, softcap=2.0) for t in range(5)])
    assert same_bits(whole, apart)


@every_isa
def test_an_infinite_score_does_not_pass_for_the_cap(isa):
    cache = native.KvCache(native.Runtime(isa, 1), 1, 16, 64, "f32")
    k, q = torch.ones(3, 1, 16), torch.ones(3, 1, 16)
    q[1, 0, 4] = float("inf")
    cache.append_(k, k, 0)
    y = cache.attend(q, 0, softcap=5.0)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


def test_what_cannot_be_is_refused_by_name():
    runtime, x = native.Runtime(None, 1), np.zeros((3, 8), np.float32)
    with pytest.raises(ShapeError, match="accepted: 'silu', 'gelu', 'gelu_tanh'"):
        native.activate(runtime, x, "relu")
    with pytest.raises(ShapeError, match="expected 8 elements, or as many for each of 1 heads"):
        native.layer_norm(runtime, x, np.zeros(9, np.float32), None, 1e-5)
    with pytest.raises(ShapeError, match="bias has shape"):
        native.layer_norm(runtime, x, np.zeros(8, np.float32), np.zeros(7, np.float32), 1e-5)
    with pytest.raises(ShapeError, match="epsilon"):
        native.layer_norm(runtime, x, np.zeros(8, np.float32), None, -1.0)
    cache = native.KvCache(runtime, 1, 8, 8)
    for softcap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ShapeError, match="softcap"):
            cache.attend(np.zeros((0, 1, 8), np.float32), 0, softcap=softcap)
