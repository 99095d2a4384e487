"""A recorded layer as the core replays it: the bits of its operations one by one, whatever else is in the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_support import every_isa, gptq_case, same_bits
from ropewalk import _core, native
from ropewalk.backends.cpu import CpuBackend
from ropewalk.backends.protocol import LowRankPart, RowChange, RowSpan
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.decoder import decoder_layer
from ropewalk.families.recorder import LayerShape, record

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 96, 112, 4, 2, 24
EPS = 1e-5
LINEARS = {
    "qkv": (HIDDEN, (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)),
    "o": (HEADS * HEAD_DIM, (HIDDEN,)),
    "gate_up": (HIDDEN, (INNER, INNER)),
    "down": (INNER, (HIDDEN,)),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TinyLayer:
    """A layer with random weights on a backend, and what it takes to run rows through it."""

    def __init__(self, isa: str | None = None, compute: str = "int8", threads: int = 2, window: int | None = None):
        self.backend = CpuBackend(compute, isa, threads)
        runtime = self.backend.runtime
        cases = {
            name: [gptq_case(k, n, 32, act_order=name == "o", seed=seed) for seed, n in enumerate(outs)]
            for name, (k, outs) in LINEARS.items()
        }
        self.linears = {
            name: native.Linear(runtime, [case.pack(runtime) for case in parts]) for name, parts in cases.items()
        }
        names = {"attn_norm": HIDDEN, "mlp_norm": HIDDEN, "q_norm": HEAD_DIM, "k_norm": HEAD_DIM}
        self.norms = {name: 1 + 0.1 * normal(size, seed=seed) for seed, (name, size) in enumerate(names.items())}
        self.window = window
        shape = LayerShape(HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, qk_norm=True, window=window)
        self.layer = self.backend.compile_layer(record(decoder_layer, shape), self.linears | self.norms, EPS)
        self.pool = self.backend.new_pool(KV_HEADS, HEAD_DIM, CacheFormat.parse("fp16"), 1 << 26)

    def change(self, seed: int, rank: int = 3) -> dict[str, native.LowRank]:
        """A low-rank change of two of the four linears."""

        def packed(name: str):
            k, outs = LINEARS[name]
            parts = [LowRankPart(normal(rank, k, seed=seed), 0.1 * normal(n, rank, seed=seed + 1)) for n in outs]
            return self.backend.pack_low_rank(parts)

        return {"qkv": packed("qkv"), "down": packed("down")}

    def run(self, sequences: list[Sequence], counts: list[int], changes=(), instance: int = 0) -> list[torch.Tensor]:
        """The next `counts` rows of each sequence through the layer in one step."""
        rows = [s.rows[s.done : s.done + count] for s, count in zip(sequences, counts, strict=True)]
        starts = [s.done for s in sequences]
        x = torch.cat(rows)
        positions = torch.cat([torch.arange(b, b + c) for b, c in zip(starts, counts, strict=True)])
        angles = positions[:, None] * 0.01 * torch.arange(1, HEAD_DIM // 2 + 1)
        spans = [
            RowSpan(count, s.done, s.reserved(self.pool, count)) for s, count in zip(sequences, counts, strict=True)
        ]
        step = self.backend.begin_step(x, angles.cos()[None], angles.sin()[None], spans)
        self.backend.run_layer_(step, self.layer, instance, 0.5, changes)
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.done += count
        return list(x.split(counts))


class Sequence:
    """Random rows, and the pages that hold what the layer keeps of them."""

    def __init__(self, length: int, seed: int) -> None:
        self.rows = normal(length, HIDDEN, seed=seed)
        self.done = 0
        self.pages: list = []

    def reserved(self, pool, count: int) -> tuple:
        while len(self.pages) * 64 < self.done + count:
            self.pages.append(pool.take(2))
        return tuple(self.pages)


def alone(tiny: TinyLayer, length: int, seed: int, changes=()) -> torch.Tensor:
    """All rows of a sequence in one step of its own."""
    return tiny.run([Sequence(length, seed)], [length], changes)[0]


def one_by_one(tiny: TinyLayer, x: torch.Tensor, cos, sin) -> torch.Tensor:
    """The layer's equation over the public kernels."""
    runtime, compute, x = tiny.backend.runtime, tiny.backend.compute, x.clone()
    cache = native.KvCache(runtime, KV_HEADS, HEAD_DIM, len(x), "f16")
    normed = native.rms_norm(runtime, x, tiny.norms["attn_norm"], EPS)
    q, k, v = tiny.linears["qkv"](normed, compute).view(len(x), -1, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    q = native.rms_norm(runtime, q, tiny.norms["q_norm"], EPS)
    k = native.rms_norm(runtime, k, tiny.norms["k_norm"], EPS)
    native.rotate_(runtime, q, cos, sin)
    native.rotate_(runtime, k, cos, sin)
    cache.append_(k, v, 0)
    native.add_(runtime, x, tiny.linears["o"](cache.attend(q, 0, tiny.window, compute), compute), 0.5)
    normed = native.rms_norm(runtime, x, tiny.norms["mlp_norm"], EPS)
    gate = native.silu_mul(runtime, tiny.linears["gate_up"](normed, compute))
    native.add_(runtime, x, tiny.linears["down"](gate, compute), 0.5)
    return x


@every_isa
@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.parametrize("window", [None, 40])
def test_a_replayed_layer_gives_the_bits_of_its_operations_one_by_one(isa, compute, window):
    tiny = TinyLayer(isa, compute, window=window)
    sequence = Sequence(300, 1)  # more rows than go through the stages together
    angles = torch.arange(300)[:, None] * 0.01 * torch.arange(1, HEAD_DIM // 2 + 1)
    expected = one_by_one(tiny, sequence.rows, angles.cos(), angles.sin())
    assert same_bits(tiny.run([sequence], [300])[0], expected)


@every_isa
def test_rows_of_a_long_sequence_do_not_depend_on_how_many_are_computed_at_once(isa):
    tiny = TinyLayer(isa, window=None)
    whole = alone(tiny, 1200, 5)
    sequence = Sequence(1200, 5)
    parts = [tiny.run([sequence], [count])[0] for count in (500, 12, 1, 1, 3, 507, 1, 175)]
    assert same_bits(torch.cat(parts), whole)


@every_isa
@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_each_row_takes_the_change_that_it_was_given(isa, compute):
    tiny = TinyLayer(isa, compute)
    first, second = tiny.change(1), tiny.change(2, rank=5)
    expected = [
        alone(tiny, 9, 1, [RowChange(0, 9, first)]),
        alone(tiny, 20, 2),
        alone(tiny, 130, 3, [RowChange(0, 130, second)]),
    ]
    together = [Sequence(9, 1), Sequence(20, 2), Sequence(130, 3)]
    got = tiny.run(together, [9, 20, 130], [RowChange(0, 9, first), RowChange(29, 159, second)])
    for ours, theirs in zip(got, expected, strict=True):
        assert same_bits(ours, theirs)


LAYERS = {isa: TinyLayer(isa, window=100) for isa in native.available_isas()}
LENGTHS = (3, 70, 129, 610)


@pytest.fixture(scope="module", params=native.available_isas())
def tiny(request):
    layer = LAYERS[request.param]
    return layer, {length: alone(layer, length, length) for length in LENGTHS}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_what_else_is_in_the_step(tiny, data):
    layer, expected = tiny
    sequences = [Sequence(length, length) for length in data.draw(st.permutations(LENGTHS))]
    got: dict[int, list[torch.Tensor]] = {len(s.rows): [] for s in sequences}
    while waiting := [s for s in sequences if s.done < len(s.rows)]:
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id))
        counts = [data.draw(st.integers(1, min(256, len(s.rows) - s.done))) for s in chosen]
        for sequence, rows in zip(chosen, layer.run(chosen, counts), strict=True):
            got[len(sequence.rows)].append(rows)
    for length, rows in got.items():
        assert same_bits(torch.cat(rows), expected[length])


def test_pages_go_back_to_their_pool():
    pool = CpuBackend("int8", threads=1).new_pool(2, 24, CacheFormat.parse("fp16"), 3 * 64 * 2 * (24 + 32) * 2)
    assert pool.page_bytes(1) == 64 * 2 * (24 + 32) * 2
    pages = [pool.take(1) for _ in range(3)]
    assert pool.used_bytes == pool.num_bytes
    with pytest.raises(MemoryError):
        pool.take(1)
    with pytest.raises(MemoryError):
        pool.copy(pages[0])
    del pages[0]
    pages.append(pool.copy(pages[0]))
    pages.clear()
    assert pool.used_bytes == 0
    assert pool.take(3)  # of another number of instances


def small_step(recent=(), **other):
    """spans: as the core takes them, but for the pages of the last positions, which are `recent` in each."""
    tiny = LAYERS[native.available_isas()[0]]
    tables = np.zeros((1, 2, HEAD_DIM // 2), np.float32)
    given = {
        "x": np.zeros((2, HIDDEN), np.float32),
        "cos": tables,
        "sin": tables,
        "spans": [(2, 0, [tiny.pool.take(1)])],
    }
    given |= other
    return _core.Step(**given | {"spans": [(*span, list(recent)) for span in given["spans"]]})


def test_a_step_is_refused_before_anything_is_touched():
    tiny = LAYERS[native.available_isas()[0]]
    page, other = tiny.pool.take(1), CpuBackend("int8").new_pool(2, 24, CacheFormat.parse("fp16"), 1 << 20).take(1)
    for spans, message in [
        ([], "fewer rows"),
        ([(1, 0, [page])], "fewer rows"),
        ([(3, 0, [page])], "more rows"),
        ([(0, 0, [page]), (2, 0, [page])], "out of range"),
        ([(2, 63, [page])], "do not fit 1 pages"),
        ([(2, -1, [page])], "do not fit 1 pages"),
        ([(2, 2**62, [page])], "do not fit 1 pages"),
        ([(2, 0, [])], "do not fit 0 pages"),
        ([(2, 0, [None])], "a page is None"),
        ([(1, 0, [page]), (1, 0, [other])], "several pools"),
        ([(1, 0, [page]), (1, 1, [page])], "used by another"),
        ([(1, 64, [page, tiny.pool.take(1)]), (1, 3, [page])], "used by another"),
    ]:
        with pytest.raises(ShapeError, match=message):
            small_step(spans=spans)
    with pytest.raises(ShapeError, match="cos has"):
        small_step(cos=np.zeros((1, 3, 12), np.float32))
    with pytest.raises(ShapeError, match="overlaps"):
        x = np.zeros((2, HIDDEN), np.float32)
        small_step(x=x, cos=x.reshape(-1)[:24].reshape(1, 2, 12))


def test_a_layer_is_refused_a_step_that_does_not_fit_it():
    tiny = LAYERS[native.available_isas()[0]]
    run = lambda step, instance=0, changes=(): tiny.layer.core.run(  # noqa: E731
        tiny.backend.runtime.core, step, instance, 1.0, list(changes)
    )
    for instance in (-1, 1, 2**62):
        with pytest.raises(ShapeError, match="lies outside pages of 1"):
            run(small_step(), instance)
    with pytest.raises(ShapeError, match="another width"):
        run(small_step(x=np.zeros((2, HIDDEN + 1), np.float32)))
    with pytest.raises(ShapeError, match="more than D / 2"):
        run(small_step(cos=np.zeros((1, 2, 13), np.float32), sin=np.zeros((1, 2, 13), np.float32)))
    with pytest.raises(ShapeError, match="a table that the step does not have"):
        run(small_step(cos=np.zeros((0, 2, 12), np.float32), sin=np.zeros((0, 2, 12), np.float32)))
    pool = CpuBackend("int8").new_pool(2, 16, CacheFormat.parse("fp16"), 1 << 20)
    with pytest.raises(ShapeError, match="do not fit the pages"):
        run(small_step(spans=[(2, 0, [pool.take(1)])]))
    none = [None] * 4
    for changes in ([(0, 3, none)], [(1, 1, none)], [(-1, 1, none)], [(0, 2, none), (1, 2, none)]):
        with pytest.raises(ShapeError, match="must ascend"):
            run(small_step(), changes=changes)
    with pytest.raises(ShapeError, match="names each linear"):
        run(small_step(), changes=[(0, 2, none[1:])])
    with pytest.raises(ShapeError, match="linears of other sizes"):
        run(small_step(), changes=[(0, 2, [None, tiny.change(1)["qkv"].core, None, None])])
    with pytest.raises(ShapeError, match="neither LowRank nor None"):
        run(small_step(), changes=[(0, 2, ["qkv", None, None, None])])


def test_stages_that_would_read_or_write_outside_their_buffers_are_refused():
    group = native.Linear(native.Runtime(), [native.dense_linear(np.zeros((8, 16), np.float32))]).core
    layer = lambda: _core.Layer([16, 8, 24, 16], "int8")  # noqa: E731
    with pytest.raises(ShapeError, match="outside its buffer"):
        layer().rotate((1, 4, 1, 8), 0)
    with pytest.raises(ShapeError, match="outside its buffer"):
        layer().rotate((1, 0, 2**14, 2**62), 0)
    with pytest.raises(ShapeError, match="no such buffer"):
        layer().rotate((4, 0, 1, 8), 0)
    for table in (-1, 2**62):
        with pytest.raises(ShapeError, match="number of a table"):
            layer().rotate((1, 0, 1, 8), table)
    with pytest.raises(ShapeError, match="differ in size from its weight"):
        layer().linear((0, 0, 1, 16), group, (2, 0, 1, 9))
    with pytest.raises(ShapeError, match="weight is not a LinearGroup"):
        layer().linear((0, 0, 1, 16), None, (1, 0, 1, 8))
    with pytest.raises(ShapeError, match="the buffer that it reads"):
        layer().linear((2, 0, 1, 16), group, (2, 16, 1, 8))
    with pytest.raises(ShapeError, match="must cover its buffer"):
        layer().rms_norm((0, 0, 1, 8), np.ones(8, np.float32), 1e-5, (2, 0, 1, 8))
    with pytest.raises(ShapeError, match="differ in shape"):
        layer().rms_norm((0, 0, 1, 8), np.ones(8, np.float32), 1e-5, (2, 0, 3, 8))
    with pytest.raises(ShapeError, match="half the columns"):
        layer().gate((2, 0, 1, 24), "silu", (1, 0, 1, 8))
    with pytest.raises(ShapeError, match="width of buffer 0"):
        layer().add_residual((1, 0, 1, 8), 1.0)
    with pytest.raises(ShapeError, match="window"):
        layer().attend((0, 0, 2, 8), (3, 0, 2, 8), -1, 1.0, 0.0)
    with pytest.raises(ShapeError, match="1 to 1024 buffers"):
        _core.Layer([], "int8")
    with pytest.raises(ShapeError, match="width of a buffer"):
        _core.Layer([16, 0], "int8")
    finished = layer()
    finished.finish()
    with pytest.raises(ShapeError, match="is finished"):
        finished.rotate((0, 0, 1, 8), 0)
    with pytest.raises(ShapeError, match="is not finished"):
        layer().run(native.Runtime().core, small_step(), 0, 1.0, [])


def test_a_linear_that_a_layer_refused_is_not_part_of_it():
    runtime = native.Runtime(threads=1)
    group = native.Linear(runtime, [native.dense_linear(np.zeros((8, HIDDEN), np.float32))]).core
    layer = _core.Layer([HIDDEN, 8], "int8")
    with pytest.raises(ShapeError, match="the buffer that it reads"):
        layer.linear((0, 0, 1, HIDDEN), group, (0, 0, 1, 8))
    layer.linear((0, 0, 1, HIDDEN), group, (1, 0, 1, 8))
    layer.finish()
    layer.run(runtime.core, small_step(), 0, 1.0, [(0, 2, [None])])
    with pytest.raises(ShapeError, match="names each linear"):
        layer.run(runtime.core, small_step(), 0, 1.0, [(0, 2, [None, None])])
