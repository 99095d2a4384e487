"""Routes and experts of the compiled core: against float64, whatever else is in a step, and what is refused."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from kernel_support import every_isa, gptq_case, same_bits
from ropewalk import _core
from ropewalk.backends.cpu import CpuBackend
from ropewalk.backends.protocol import ExpertRoom, RowSpan
from ropewalk.backends.reference import ReferenceBackend
from ropewalk.base.errors import NativeError, ShapeError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import Activation
from ropewalk.families.recorder import Recorder
from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear

HIDDEN, INNER, EXPERTS, TOP_K = 80, 48, 9, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gptq(k: int, n: int, seed: int) -> GptqLinear:
    arguments = gptq_case(k, n, 32, act_order=seed % 2 == 1, seed=seed).arguments
    tensors = {
        name: torch.from_numpy(arguments[name]) if arguments[name] is not None else None
        for name in ("qweight", "scales", "zeros", "group_starts", "order", "bias")
    }
    return GptqLinear(f"linear {seed}", 4, k, n, False, **tensors)


def dense(k: int, n: int, seed: int) -> DenseLinear:
    return DenseLinear(f"dense {seed}", (normal(n, k, seed=seed) / k**0.5).to(torch.bfloat16), None)


def some_experts(make=gptq) -> list[Expert]:
    return [
        Expert(
            make(HIDDEN, INNER, 3 * number), make(HIDDEN, INNER, 3 * number + 1), make(INNER, HIDDEN, 3 * number + 2)
        )
        for number in range(EXPERTS)
    ]


def weight(linear: GptqLinear | DenseLinear) -> torch.Tensor:
    """[K, N] float64."""
    if isinstance(linear, DenseLinear):
        return linear.weight.double().T
    return linear.dequantise().double()


def formula(x: torch.Tensor, router: torch.Tensor, experts: list[Expert], normalised: bool) -> torch.Tensor:
    """x: [T, C] -> what a layer adds, in the dtype of x."""
    shares = (x @ router.to(x.dtype).T).softmax(-1)  # [T, E]
    kept, chosen = shares.topk(TOP_K, dim=-1)
    kept = kept / kept.sum(-1, keepdim=True) if normalised else kept
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for share, number in sorted(zip(kept[row], chosen[row].tolist(), strict=True), key=lambda pair: pair[1]):
            gate, up, down = (weight(linear).to(x.dtype) for linear in experts[number])
            out[row] += share * ((torch.nn.functional.silu(x[row] @ gate) * (x[row] @ up)) @ down)
    return out


class Mixture:
    """A layer that adds what its experts make of x, on a backend."""

    def __init__(self, backend, experts, normalised: bool = True) -> None:
        self.backend = backend
        self.router = normal(EXPERTS, HIDDEN, seed=77) / HIDDEN**0.5 * 2
        ops = Recorder(HIDDEN, {"router": EXPERTS})
        routes = ops.route(ops.linear(ops.residual, "router"), TOP_K, normalised)
        ops.add_residual_(ops.experts(ops.residual, routes, "experts", Activation.SILU))
        self.experts = backend.pack_experts(experts)
        weights = {"router": backend.pack([DenseLinear("router", self.router, None)]), "experts": self.experts}
        self.layer = backend.compile_layer(ops.program, weights, 1e-5)
        self.pool = backend.new_pool(1, 8, CacheFormat.parse("fp16"), 1 << 24)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """x + what the layer adds."""
        x, none = rows.clone(), torch.zeros(1, len(rows), 0)
        pages = tuple(self.pool.take(1) for _ in range(-(-len(rows) // 64)))
        step = self.backend.begin_step(x, none, none, [RowSpan(len(rows), 0, pages)])
        self.backend.run_layer_(step, self.layer, 0, 1.0, ())
        self.backend.end_step_(step)
        return x


@every_isa
@pytest.mark.parametrize("make", [gptq, dense])
@pytest.mark.parametrize("normalised", [True, False])
def test_experts_are_as_accurate_as_float32(isa, make, normalised):
    experts, x = some_experts(make), normal(20, HIDDEN, seed=5)
    mixture = Mixture(CpuBackend("exact", isa, 2), experts, normalised)
    exact = x.double() + formula(x.double(), mixture.router, experts, normalised)
    assert_as_accurate(mixture(x), exact, x + formula(x, mixture.router, experts, normalised))


@every_isa
def test_rounded_activations_give_what_the_reference_gives(isa):
    experts, x = some_experts(), normal(20, HIDDEN, seed=5)
    ours, theirs = (Mixture(backend, experts)(x) for backend in (CpuBackend("int8", isa, 2), ReferenceBackend("int8")))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@every_isa
@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_the_threads(isa, compute):
    experts, x = some_experts(), normal(600, HIDDEN, seed=6)  # more rows than go through the stages together
    whole = Mixture(CpuBackend(compute, isa, 1), experts)(x)
    mixture = Mixture(CpuBackend(compute, isa, 3), experts)
    assert same_bits(mixture(x), whole)
    assert same_bits(torch.cat([mixture(rows) for rows in x[:40].split([1, 1, 7, 31])]), whole[:40])
    assert same_bits(mixture(x.flip(0)).flip(0), whole)


class Counted(list):
    """Experts that count how often each was read."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.reads: list[int] = []
        self.asked: list[int] = []

    def __getitem__(self, number):
        self.reads.append(number)
        return super().__getitem__(number)

    def read_ahead(self, numbers) -> None:
        self.asked += numbers


def test_experts_that_are_not_held_are_read_when_they_are_needed():
    x = normal(130, HIDDEN, seed=6)
    held = Mixture(CpuBackend("int8", threads=2), some_experts())
    total = held.experts.num_bytes
    few = Counted(some_experts())
    room = ExpertRoom(int(total * 4.5 / EXPERTS), 0.5)
    mixture = Mixture(CpuBackend("int8", threads=2, experts=room), few)
    assert few.reads == [0, 1, 2, 3]
    for start in range(0, 130, 10):  # in some of which more are needed than there is room for
        assert same_bits(mixture(x[start : start + 10]), held(x[start : start + 10]))
    for row in x[:20]:
        assert same_bits(mixture(row[None]), held(row[None]))
        assert mixture.experts.num_bytes <= room.num_bytes
    assert set(few.reads) == set(range(EXPERTS)) and set(few.asked) <= set(few.reads)
    before = len(few.reads)
    assert same_bits(mixture(x[19:20]), held(x[19:20]))
    assert len(few.reads) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_experts_that_come_and_go_take_no_more_memory_than_they_may():
    size, count = 512, 120
    one = Expert(gptq(size, size, 2), gptq(size, size, 4), gptq(size, size, 6))
    backend = CpuBackend("int8", threads=1, experts=ExpertRoom(20 << 20, 0.1))
    experts = backend.pack_experts([one] * count)
    before = resident_bytes()
    for hot in range(10):  # each stays in use while a hundred others come and go
        for cold in range(10, 110):
            experts.bring_([*range(hot + 1), cold])
    assert experts.num_bytes <= 20 << 20
    assert resident_bytes() - before < 80 << 20  # two blocks, and what is read meanwhile; it was one for each hot one


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def test_an_expert_that_cannot_be_read_ends_the_step_with_its_error():
    class Lost(Counted):
        def __getitem__(self, number):
            if self.lost:
                raise OSError("the disk is gone")
            return super().__getitem__(number)

    experts = Lost(some_experts())
    experts.lost = False
    mixture = Mixture(CpuBackend("int8", experts=ExpertRoom(1 << 14, 0.2)), experts)
    x = normal(30, HIDDEN)
    want = mixture(x)
    mixture(x[:1])  # after which few are held
    experts.lost = True
    with pytest.raises(OSError, match="the disk is gone"):
        mixture(x)
    experts.lost = False
    assert same_bits(mixture(x), want)


def test_a_mixture_that_nobody_uses_is_freed():
    mixture = Mixture(CpuBackend("int8", experts=ExpertRoom(1 << 14, 0.2)), some_experts())
    mixture(normal(3, HIDDEN))
    gone = weakref.ref(mixture.experts)
    del mixture
    gc.collect()
    assert gone() is None


@every_isa
def test_equal_logits_go_to_the_smaller_number_and_what_is_not_a_number_shows(isa):
    mixture = Mixture(CpuBackend("exact", isa, 1), some_experts())
    mixture.router[:] = 0  # used where it lies
    x = normal(4, HIDDEN, seed=3)
    first = [expert if number < TOP_K else None for number, expert in enumerate(some_experts())]
    gates = [torch.nn.functional.silu(x @ weight(e.gate).float()) * (x @ weight(e.up).float()) for e in first[:TOP_K]]
    want = x + sum(g @ weight(e.down).float() for g, e in zip(gates, first, strict=False)) / TOP_K
    assert (mixture(x) - want).abs().max() < 1e-5 * want.abs().max()
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[2, 7] = value
        got = mixture(bad)
        assert not torch.isfinite(got[2]).any()
        assert same_bits(got[[0, 1, 3]], mixture(x)[[0, 1, 3]])


def test_experts_that_do_not_fit_are_refused():
    backend = CpuBackend("int8")
    experts = some_experts()
    with pytest.raises(ShapeError, match="at least one expert"):
        backend.pack_experts([])
    narrow = Expert(gptq(HIDDEN, 32, 1), gptq(HIDDEN, 32, 2), gptq(32, HIDDEN, 3))
    with pytest.raises(ShapeError, match="differs in size from the others"):
        backend.pack_experts([*experts, narrow])
    with pytest.raises(ShapeError, match="have one size"):
        ReferenceBackend().pack_experts([*experts, narrow])
    gate_up, down = backend.pack([experts[0].gate, experts[0].up]).core, backend.pack([experts[0].down]).core
    few = _core.Experts(2, HIDDEN, INNER, None)
    few.put(0, gate_up, down)
    for number in (-1, 2, 2**62):
        with pytest.raises(ShapeError, match="there is no expert"):
            few.put(number, gate_up, down)
        with pytest.raises(ShapeError, match="there is no expert"):
            few.drop(number)
    with pytest.raises(ShapeError, match="two LinearGroups"):
        few.put(0, gate_up, None)
    for sizes in ((0, 8, 8), (1025, 8, 8), (2, 0, 8), (2, 8, 2**30)):
        with pytest.raises(ShapeError, match="1 to 1024 experts|out of range"):
            _core.Experts(*sizes, None)
    with pytest.raises(ShapeError, match="neither None nor callable"):
        _core.Experts(2, 8, 8, "fetch")


def test_stages_of_a_mixture_that_do_not_fit_are_refused():
    layer = _core.Layer([HIDDEN, 4, 2, HIDDEN, 1], "int8")
    experts = _core.Experts(2, HIDDEN, INNER, None)
    x, logits, out, gate = (0, 0, 1, HIDDEN), (1, 0, 1, 4), (3, 0, 1, HIDDEN), (4, 0, 1, 1)
    for top_k, routes, message in (
        (0, (2, 0, 2, 1), "top_k must be"),
        (5, (2, 0, 2, 1), "top_k must be"),
        (2, (2, 0, 2, 1), "two heads of top_k"),
        (1, (2, 0, 1, 2), "two heads of top_k"),
    ):
        with pytest.raises(ShapeError, match=message):
            layer.route(logits, top_k, True, routes)
    with pytest.raises(ShapeError, match="not an Experts"):
        layer.experts(x, (2, 0, 2, 1), None, "silu", out)
    with pytest.raises(ShapeError, match="activation is 'tanh'"):
        layer.experts(x, (2, 0, 2, 1), experts, "tanh", out)
    with pytest.raises(ShapeError, match="differ in size from their weights"):
        layer.experts(logits, (2, 0, 2, 1), experts, "silu", out)
    with pytest.raises(ShapeError, match="routes are two heads"):
        layer.experts(x, (2, 0, 1, 2), experts, "silu", out)
    with pytest.raises(ShapeError, match="the gate is not one column"):
        layer.sigmoid_mul(x, logits, out)
    with pytest.raises(ShapeError, match="the gate is not one column"):
        layer.sigmoid_mul(logits, gate, out)
    with pytest.raises(ShapeError, match="scale must be finite"):
        layer.add_residual(out, float("inf"))


def test_a_route_to_no_expert_is_refused_while_it_runs():
    """Whatever a program puts in the place of routes."""
    backend = CpuBackend("int8", threads=1)
    pool = backend.new_pool(1, 8, CacheFormat.parse("fp16"), 1 << 20)
    core = _core.Layer([HIDDEN, HIDDEN], "int8")
    experts = _core.Experts(2, HIDDEN, INNER, None)
    core.experts((0, 0, 1, HIDDEN), (0, 0, 2, 2), experts, "silu", (1, 0, 1, HIDDEN))
    core.finish()
    none = np.zeros((1, 1, 0), np.float32)
    for value, message in (
        (-1.0, "leads to expert"),
        (2.0, "leads to expert"),
        (float("nan"), "leads to expert"),
        (1.0, "has not been put there"),
    ):
        x = np.full((1, HIDDEN), value, np.float32)
        step = _core.Step(x, none, none, [(1, 0, [pool.take(1)], [])])
        with pytest.raises((NativeError, ShapeError), match=message):
            core.run(backend.runtime.core, step, 0, 1.0, [])
