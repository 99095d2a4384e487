"""The executable specification against formulas written out here in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accuracy import assert_as_accurate
from gptq_writer import Kind, quantised_linear
from ropewalk.backends.reference import ReferenceBackend, attention
from ropewalk.backends.reference import linear as linear_module
from ropewalk.backends.reference.attention import Seen, attend, rotate_
from ropewalk.backends.reference.layers import activate, route
from ropewalk.backends.reference.pages import append_, gathered
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.quantisation import QuantSettings
from ropewalk.families.program import Activation
from ropewalk.files.folder import Checkpoint
from ropewalk.gptq.linear import DenseLinear, GptqLinear, read_gptq_linear

PLAIN = Seen(None, 8**-0.5, None)
EXACT, INT8 = ReferenceBackend("exact"), ReferenceBackend("int8")
K = 96
DTYPES = (torch.float64, torch.float32)  # of the exact and of the plain computation


def quantised(folder: Path, kind: Kind, in_features: int = K, out_features: int = 32, bias: bool = False) -> GptqLinear:
    """A linear written to disk and read back."""
    rng = np.random.default_rng(3)
    bias_tensor = torch.from_numpy(rng.standard_normal(out_features)).half() if bias else None
    tensors, _ = quantised_linear("m", in_features, out_features, kind, rng, bias_tensor)
    save_file(tensors, folder / "model.safetensors")
    settings = QuantSettings(kind.bits, kind.group_size, kind.desc_act, kind.sym, kind.format, kind.word_borrow)
    with Checkpoint(folder) as checkpoint:
        return read_gptq_linear(checkpoint, "m", in_features, out_features, settings)


def dense(out_features: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> DenseLinear:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out_features, K, generator=generator).to(dtype)
    return DenseLinear("dense", weight, torch.randn(out_features, generator=generator) if bias else None)


def rows(num_rows: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, *shape, generator=torch.Generator().manual_seed(seed))


def int8_by_hand(x: torch.Tensor, linear: GptqLinear, dtype: type) -> np.ndarray:
    """The formula of the protocol on blocks of 32 rows in sorted order; scales and sums of blocks in `dtype`."""
    order = np.arange(linear.in_features) if linear.order is None else linear.order.numpy()
    codes, scales, zeros = linear.codes().numpy().astype(int), linear.scales.numpy().astype(dtype), linear.zeros.numpy()
    y = np.zeros((len(x), linear.out_features), dtype)
    for group in range(len(scales)):
        sorted_rows = order[int(linear.group_starts[group]) : int(linear.group_starts[group + 1])]
        for first in range(0, len(sorted_rows), 32):
            block = sorted_rows[first : first + 32]
            values = x.numpy()[:, block]
            step = np.abs(values).max(1, keepdims=True) / np.float32(127)
            q = np.rint(np.divide(values, step, out=np.zeros_like(values), where=step > 0)).astype(int)
            sums = q @ codes[block] - zeros[group].astype(int) * q.sum(1, keepdims=True)
            y += step.astype(dtype) * scales[group] * sums.astype(dtype)
    return y


@pytest.mark.parametrize(
    "kind",
    [
        Kind(bits=4, group_size=32, desc_act=True, sym=False, format="gptq_v2"),
        Kind(bits=8, group_size=48),
        Kind(bits=3, group_size=-1, desc_act=True),
        Kind(bits=2, group_size=40, sym=False),
        Kind(bits=5, group_size=32, format="gptq_p"),
    ],
    ids=lambda kind: f"{kind.bits}bit-{kind.group_size}",
)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_quantised_products_follow_their_formulas(tmp_path: Path, kind: Kind, num_rows: int) -> None:
    linear = quantised(tmp_path, kind, bias=True)
    x = rows(num_rows, K)
    x[0, :40] = 0.0  # whole blocks of zeros have no scale
    exact, plain = (x.to(dtype) @ linear.dequantise().to(dtype) + linear.bias.to(dtype) for dtype in DTYPES)
    assert_as_accurate(EXACT.linear(x, EXACT.pack([linear])), exact, plain)
    exact, plain = (int8_by_hand(x, linear, dtype) + linear.bias.numpy() for dtype in (np.float64, np.float32))
    assert_as_accurate(INT8.linear(x, INT8.pack([linear])), exact, plain)


def test_int8_rows_do_not_depend_on_the_rows_beside_them(tmp_path: Path) -> None:
    packed = INT8.pack([quantised(tmp_path, Kind(desc_act=True))])
    x = rows(9, K)
    assert torch.equal(INT8.linear(x, packed)[4:5], INT8.linear(x[4:5], packed))


def test_no_operation_assumes_the_default_device(tmp_path: Path) -> None:
    packed = [
        (backend, backend.pack([quantised(tmp_path, kind, bias=True)]))
        for backend in (EXACT, INT8)
        for kind in (Kind(), Kind(desc_act=True), Kind(bits=3, format="gptq_p"))
    ]
    x, dense_packed = rows(2, K), EXACT.pack([dense(8)])
    k, q, table = rows(2, 2, 8), rows(2, 4, 8), rows(4, 8)
    with torch.device("meta"):  # what does not follow its inputs ends up there, and mixing devices is an error
        results = [backend.linear(x, weight) for backend, weight in packed]
        results += [EXACT.linear(x, dense_packed), EXACT.embed(table, torch.tensor([3], device="cpu"))]
        results += [EXACT.rms_norm(x, x[0], 1e-5), EXACT.layer_norm(x, x[0], x[1], 1e-5)]
        results += [activate(x, activation) for activation in Activation]
        rotate_(k, k[:, 0, :4].contiguous(), k[:, 1, :4].contiguous())
        page = EXACT.new_pool(2, 8, CacheFormat.parse("fp16"), 1 << 20).take(1)
        append_([page], 0, k, k, 0)
        results.append(attend(q, *gathered([page], 0, 2), 0, Seen(3, 0.5, 2.0)))
    assert all(result.device.type == "cpu" for result in results)


def test_blocks_of_zeros_and_of_denormals_give_no_nan(tmp_path: Path) -> None:
    packed = INT8.pack([quantised(tmp_path, Kind())])
    for value in (0.0, 1e-45, 1e-40):
        assert torch.isfinite(INT8.linear(torch.full((1, K), value), packed)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", [EXACT, INT8], ids=["exact", "int8"])
def test_dense_weights_use_float32_activations_in_both_modes(
    backend: ReferenceBackend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "SCRATCH_BYTES", 4 * K * 7)  # seven output rows at a time, 20 in all
    linear, x = dense(20, dtype, bias=True), rows(3, K)
    exact, plain = (x.to(each) @ linear.weight.to(each).T + linear.bias.to(each) for each in DTYPES)
    assert_as_accurate(backend.linear(x, backend.pack([linear])), exact, plain)


def test_parts_are_concatenated_whether_quantised_or_dense(tmp_path: Path) -> None:
    parts = [dense(8), quantised(tmp_path, Kind(desc_act=True)), dense(4, bias=True)]
    packed, x = EXACT.pack(parts), rows(2, K)
    assert (packed.in_features, packed.out_features) == (K, 8 + 32 + 4)
    alone = torch.cat([EXACT.linear(x, EXACT.pack([part])) for part in parts], dim=1)
    assert torch.equal(EXACT.linear(x, packed), alone)


def test_packed_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    linear = quantised(tmp_path, Kind(bits=4, group_size=32, desc_act=True))
    quantised_bytes = K * 32 // 2 + 3 * 32 * (2 + 1) + 8 * 4 + 4 * K  # codes, scales and zeros, starts, order
    assert EXACT.pack([linear, dense(8, torch.float16)]).num_bytes == quantised_bytes + 2 * 8 * K


def test_packing_nothing_or_different_inputs_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        EXACT.pack([])
    with pytest.raises(ShapeError, match="'dense': 96, 'narrow': 64"):
        EXACT.pack([dense(8), DenseLinear("narrow", torch.zeros(8, 64), None)])
    with pytest.raises(ShapeError, match=r"\[T, 96\], got \[2, 64\]"):
        EXACT.linear(torch.zeros(2, 64), EXACT.pack([dense(8)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_embeddings_are_widened_rows(dtype: torch.dtype) -> None:
    table = rows(10, 6).to(dtype)
    assert torch.equal(EXACT.embed(table, torch.tensor([9, 0, 9])), table[[9, 0, 9]].float())


def test_rms_norm_of_a_strided_view() -> None:
    x, weight = rows(4, 5, 24)[:, 1:3, :16], rows(1, 16)[0]  # [4, 2, 16]
    exact, plain = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight for x in (x.double(), x))
    got = EXACT.rms_norm(x, weight, 1e-5)
    assert got.is_contiguous()
    assert_as_accurate(got, exact, plain)


@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rotation_multiplies_complex_pairs_and_leaves_the_rest(rotary_dim: int) -> None:
    fused = rows(3, 5, 16)  # [T, H, D], two of five heads are rotated
    before, half = fused.clone(), rotary_dim // 2
    angles = torch.tensor([0.0, 1.0, 131071.0], dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(half) / half)
    rotate_(fused[:, 1:3], angles.cos().float(), angles.sin().float())
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    exact, plain = (
        torch.complex(part[:, 1:3, :half], part[:, 1:3, half:rotary_dim]) * turn.to(dtype)
        for part, dtype in ((before.double(), torch.complex128), (before, torch.complex64))
    )
    assert_as_accurate(fused[:, 1:3, :half], exact.real, plain.real)
    assert_as_accurate(fused[:, 1:3, half:rotary_dim], exact.imag, plain.imag)
    before[:, 1:3, :rotary_dim] = fused[:, 1:3, :rotary_dim]
    assert torch.equal(fused, before)


def test_rotation_tables_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError, match="rotate"):
        rotate_(rows(3, 1, 16), rows(2, 8), rows(2, 8))
    with pytest.raises(ShapeError, match="rotate"):
        rotate_(rows(3, 1, 16), rows(3, 9), rows(3, 9))


def attention_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, seen: Seen, dtype: torch.dtype
) -> torch.Tensor:
    """q: [T, Hq, D], k, v: [S, Hkv, D], one query and one head at a time, computed in `dtype`."""
    q, k, v = (array.to(dtype) for array in (q, k, v))
    out = torch.empty(q.shape, dtype=dtype)
    for t in range(q.shape[0]):
        i = start + t
        low = 0 if seen.window is None else max(0, i - seen.window + 1)
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // k.shape[1])
            scores = k[low : i + 1, kv_head] @ q[t, head] * seen.scale
            if seen.softcap is not None:
                scores = seen.softcap * torch.tanh(scores / seen.softcap)
            out[t, head] = scores.softmax(0) @ v[low : i + 1, kv_head]
    return out.flatten(1)


@pytest.mark.parametrize("start, num_rows", [(0, 1), (0, 13), (9, 1), (9, 7)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scratch", [1, 1 << 26], ids=["row-by-row", "one-block"])
def test_attention_is_causal_windowed_grouped_and_capped(
    start: int, num_rows: int, window: int | None, softcap: float | None, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(window, 0.3, softcap)
    monkeypatch.setattr(attention, "SCRATCH_BYTES", scratch)
    end = start + num_rows
    k, v, q = rows(end, 2, 8), rows(end, 2, 8, seed=2), rows(num_rows, 7, 8, seed=3)[:, 1:]
    got = attend(q, k.transpose(0, 1), v.transpose(0, 1), start, seen)
    assert got.is_contiguous()
    assert_as_accurate(got, *(attention_by_hand(q, k, v, start, seen, dtype) for dtype in DTYPES))


def pages_of(num_pages: int, cache_type: str = "fp32", instances: int = 2) -> list:
    """Pages of 2 heads of 8, full of what was never written."""
    pool = EXACT.new_pool(2, 8, CacheFormat.parse(cache_type), 1 << 30)
    pages = [pool.take(instances) for _ in range(num_pages)]
    for page in pages:
        page.memory.fill_(255)  # NaN in every float type
    return pages


@pytest.mark.parametrize("cuts", [(0, 1), (0, 64), (0, 65), (0, 63, 64, 130), (0, 60, 70, 150), (0, 192)])
def test_positions_are_found_again_whatever_pages_and_calls_they_came_in(cuts: tuple[int, ...]) -> None:
    end = cuts[-1]
    pages, k, v = pages_of(3), rows(end, 2, 8), rows(end, 2, 8, seed=2)
    for low, high in itertools.pairwise(cuts):
        append_(pages, 1, k[low:high], v[low:high], low)
    keys, values = gathered(pages, 1, end)
    assert torch.equal(keys, k.transpose(0, 1)) and torch.equal(values, v.transpose(0, 1))
    assert bool(gathered(pages, 0, end)[0].isnan().all())  # the other layer instance has none


def test_keys_and_values_are_rounded_to_the_dtype_of_the_pages() -> None:
    pages, k, v, q = pages_of(1, "fp16"), rows(4, 2, 8), rows(4, 2, 8, seed=2), rows(4, 4, 8, seed=3)
    append_(pages, 0, k, v, 0)
    expected = (attention_by_hand(q, k.half(), v.half(), 0, PLAIN, dtype) for dtype in DTYPES)
    assert_as_accurate(attend(q, *gathered(pages, 0, 4), 0, PLAIN), *expected)


def test_pages_refuse_what_does_not_fit() -> None:
    pages = pages_of(1)
    for k, v, start in ((rows(2, 2, 8), rows(2, 2, 8), 63), (rows(2, 3, 8), rows(2, 3, 8), 0)):
        with pytest.raises(ShapeError, match="append"):
            append_(pages, 0, k, v, start)
    with pytest.raises(ShapeError, match="append"):
        append_(pages, 0, rows(2, 2, 8), rows(1, 2, 8), 0)
    keys, values = gathered(pages, 0, 4)
    for q, start in ((rows(2, 4, 8), 3), (rows(2, 3, 8), 0), (rows(2, 4, 9), 0)):
        with pytest.raises(ShapeError, match="attend"):
            attend(q, keys, values, start, PLAIN)


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(
    "activation, by_hand",
    [
        (Activation.SILU, lambda x: x / (1 + (-x).exp())),
        (Activation.GELU, gelu_by_hand),
        (Activation.GELU_TANH, tanh_gelu_by_hand),
    ],
)
def test_activations_follow_their_formulas(activation: Activation, by_hand: Callable) -> None:
    x = 3 * rows(3, 10)
    assert_as_accurate(activate(x, activation), by_hand(x.double()), by_hand(x))


@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm_of_a_strided_view(with_bias: bool) -> None:
    x, weight, bias = rows(4, 5, 24)[:, 1:3, :16] + 2, rows(1, 16)[0], rows(1, 16, seed=2)[0]
    exact, plain = (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight
        + (bias if with_bias else 0)
        for x in (x.double(), x)
    )
    got = EXACT.layer_norm(x, weight, bias if with_bias else None, 1e-5)
    assert got.is_contiguous()
    assert_as_accurate(got, exact, plain)


def test_experts_are_chosen_by_their_share_and_listed_in_order() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    chosen, shares = route(logits, 2, normalised=False).unbind(1)
    assert chosen.tolist() == [[1, 2], [0, 1]]  # of equal logits the smaller number
    assert torch.equal(shares, logits.softmax(-1).gather(1, chosen.long()))
    assert route(logits, 3, normalised=True)[0, 0].tolist() == [1, 2, 3]
    assert torch.allclose(route(logits, 3, normalised=True)[:, 1].sum(-1), torch.ones(2))
