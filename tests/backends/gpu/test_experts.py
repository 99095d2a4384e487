"""Mixtures of experts: which experts a row has, and what they make of it, in every arrangement of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_support import DEVICE, normal, plain_form, same_bits
from kernel_support import gptq_case
from ropewalk.backends.gpu import expert_stacks, experts, pairs
from ropewalk.backends.gpu.expert_stacks import GpuExperts
from ropewalk.backends.gpu.pairs import grouped
from ropewalk.backends.reference import layers
from ropewalk.base.errors import ShapeError, UnsupportedError
from ropewalk.families.program import Activation
from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around

C, INNER, NUM_EXPERTS, TOP_K = 128, 32, 4, 2


@dataclass(frozen=True)
class Mixture:
    """The linears of all experts."""

    experts: list[Expert]

    def packed(self, compute: str = "fp16") -> GpuExperts:
        return expert_stacks.pack(self.experts, DEVICE, compute)

    def by_hand(self, x: torch.Tensor, routes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Each row with each of its experts, in the order in which they are added; silu."""
        out = torch.zeros(x.shape, dtype=dtype)
        for row, (numbers, shares) in enumerate(routes.cpu().to(dtype)):
            for number, share in zip(numbers.long().tolist(), shares, strict=True):
                gate, up, down = (part.dequantise().to(dtype) for part in self.experts[number])
                given = x[row].cpu().to(dtype)
                out[row] += share * ((layers.activate(given @ gate, Activation.SILU) * (given @ up)) @ down)
        return out


def mixture(bits: Sequence[int] = (4,), act_order: str = "none") -> Mixture:
    """bits: of the experts in turn. act_order: "none", "shared" by gate and up of an expert, or each its "own"."""
    experts = []
    for number in range(NUM_EXPERTS):
        parts: dict[str, GptqLinear] = {}
        for seed, name in enumerate(("gate", "up", "down")):
            shape = (INNER, C) if name == "down" else (C, INNER)
            given = {"bits": bits[number % len(bits)], "act_order": act_order != "none", "seed": 3 * number + seed}
            parts[name] = plain_form(gptq_case(*shape, 32, **given), f"experts.{number}.{name}")
        if act_order == "shared":
            parts["up"] = replace(parts["up"], order=parts["gate"].order)
        experts.append(Expert(**parts))
    return Mixture(experts)


def routed(num_rows: int, seed: int = 5) -> torch.Tensor:
    """[T, 2, TOP_K] as rows of random logits are routed."""
    return layers.route(normal(num_rows, NUM_EXPERTS, seed=seed), TOP_K, True).to(DEVICE)


def run(
    weight: GpuExperts, x: torch.Tensor, routes: torch.Tensor, activation: Activation = Activation.SILU
) -> torch.Tensor:
    """[T, C]; nothing beside it was written."""
    out = guarded(torch.full(x.shape, float("nan"), device=DEVICE))
    experts.run_(weight, x, routes, activation, out)
    assert room_around(out).isnan().all()
    return out.clone()


@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (60, 4), (5, 5)])
@pytest.mark.parametrize("normalised", [True, False])
def test_rows_are_routed_as_the_reference_routes_them(num_experts: int, top_k: int, normalised: bool) -> None:
    logits = normal(5, num_experts) * 4
    logits[2], logits[3, 1], logits[3, 4] = 0.0, 9.0, 9.0  # of equal ones the first is taken
    out = guarded(torch.full((5, 2, top_k), float("nan"), device=DEVICE))
    experts.route_(guarded(logits.to(DEVICE)), normalised, out)
    exact = layers.route(logits.double(), top_k, normalised)
    plain = layers.route(logits, top_k, normalised)
    assert torch.equal(out[:, 0].cpu(), plain[:, 0].float()) and room_around(out).isnan().all()
    assert_as_accurate(out[:, 1].cpu(), exact[:, 1], plain[:, 1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_of_any_logits_have_experts_that_there_are() -> None:
    logits = normal(3, 6).to(DEVICE)
    logits[0], logits[1, 2], logits[2, :] = float("nan"), float("nan"), float("-inf")
    out = torch.full((3, 2, 3), float("nan"), device=DEVICE)
    experts.route_(logits, True, out)
    for numbers in out[:, 0].tolist():
        assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(6))


KINDS = [
    ((4,), "none", "fp16"),
    ((4,), "shared", "fp16"),
    ((4, 8, 2), "shared", "fp16"),
    ((3,), "own", "exact"),
]


@pytest.mark.parametrize("bits, act_order, compute", KINDS)
def test_rows_are_what_their_experts_make_of_them(bits: Sequence[int], act_order: str, compute: str) -> None:
    given, x, routes = mixture(bits, act_order), normal(4, C).to(DEVICE), routed(4)
    found = run(given.packed(compute), x, routes).cpu()
    exact = given.by_hand(x, routes, torch.float64)
    if compute == "exact":
        assert_as_accurate(found, exact, given.by_hand(x, routes, torch.float32))
    else:
        assert (found - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_few_pairs_and_many_give_the_same_bits_and_so_do_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, routes = mixture((8,), "shared").packed(), normal(5, C).to(DEVICE), routed(5)
    assert all(stack.weights.splits > 1 for stack in weight.gate_up)
    direct = run(weight, x, routes, Activation.GELU_TANH)
    assert same_bits(run(weight, x[3:4], routes[3:4], Activation.GELU_TANH), direct[3:4])
    monkeypatch.setattr(pairs, "DIRECT_PAIRS", 0)
    assert same_bits(run(weight, x, routes, Activation.GELU_TANH), direct)
    monkeypatch.setattr(experts, "ROWS_AT_ONCE", 3)
    assert same_bits(run(weight, x, routes, Activation.GELU_TANH), direct)


def test_rows_that_leave_float16_keep_their_digits() -> None:
    given, routes = mixture(), routed(2)
    x = normal(2, C).to(DEVICE) * torch.tensor([[1e5], [1e-6]], device=DEVICE)
    found = run(given.packed(), x, routes).cpu()
    exact = given.by_hand(x, routes, torch.float64)
    for row in range(2):
        assert (found[row] - exact[row]).abs().max() <= 2e-3 * exact[row].abs().max()


def test_an_expert_without_rows_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in place of its weights: in few pairs as in many."""
    weight, x = mixture().packed(), normal(3, C).to(DEVICE)
    routes = torch.tensor([[[0.0, 3.0], [0.25, 0.75]]], device=DEVICE).repeat(3, 1, 1)
    expected = run(weight, x, routes)
    for stack in (*weight.gate_up, *weight.down):
        stack.weights.scales[1:3] = float("nan")
    for most in (pairs.DIRECT_PAIRS, 0):
        monkeypatch.setattr(pairs, "DIRECT_PAIRS", most)
        assert same_bits(run(weight, x, routes), expected)


def test_experts_of_one_kind_are_one_stack() -> None:
    weight = mixture((4,), "shared").packed()
    assert [len(stacks) for stacks in (weight.gate_up, weight.down)] == [1, 1]
    assert weight.gate_up[0].has_own_orders and weight.gate_up[0].weights.words.shape[0] == NUM_EXPERTS
    mixed = mixture((4, 8), "own").packed()
    assert [len(stacks) for stacks in (mixed.gate_up, mixed.down)] == [4, 2]
    assert mixed.down[1].slots.tolist() == [-1, 0, -1, 1]
    assert mixed.num_bytes == sum(stack.num_bytes for stack in (*mixed.gate_up, *mixed.down))


@pytest.mark.parametrize("tile_rows", [1, 4, 64])
def test_grouped_pairs_are_all_pairs_by_expert_in_their_order(tile_rows: int) -> None:
    chosen = torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    chosen[chosen == 4] = 5  # an expert without rows
    made = grouped(chosen.to(DEVICE), 8, tile_rows)
    found = []
    for expert, first, count in made.tiles.tolist():
        inside = made.order[first : first + count].tolist()
        assert count <= tile_rows and all(chosen[pair] == expert for pair in inside)
        found += [(expert, pair) for pair in inside]
    assert found == sorted((int(expert), pair) for pair, expert in enumerate(chosen))


@interpreted_only
@pytest.mark.parametrize("most", [0, pairs.DIRECT_PAIRS])
def test_every_address_is_one_of_a_tensor(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "DIRECT_PAIRS", most)
    weight, out = mixture((8, 3), "own").packed(), torch.empty(3, 2, TOP_K)
    with inside_arguments(monkeypatch):
        experts.route_(guarded(normal(3, NUM_EXPERTS)), False, out)
        experts.run_(weight, guarded(normal(3, C)), out, Activation.GELU, torch.empty(3, C))


def test_no_rows_are_no_launch() -> None:
    nothing = torch.empty(0, C, device=DEVICE)
    experts.run_(mixture().packed(), nothing, torch.empty(0, 2, TOP_K, device=DEVICE), Activation.SILU, nothing)
    experts.route_(torch.empty(0, 4, device=DEVICE), True, torch.empty(0, 2, TOP_K, device=DEVICE))


def test_what_does_not_fit_is_refused() -> None:
    given = mixture()
    one, other = given.experts[:2]
    dense = DenseLinear(name="experts.1.up", weight=torch.zeros(INNER, C), bias=None)
    with pytest.raises(UnsupportedError, match=r"experts\.1\.up: its weights are not quantised"):
        expert_stacks.pack([one, Expert(other.gate, dense, other.down)], DEVICE, "fp16")
    with pytest.raises(ShapeError, match="at least one expert is needed"):
        expert_stacks.pack([], DEVICE, "fp16")
    with pytest.raises(ShapeError, match=r"experts\.1\.down \(32, 128\).*: experts of a layer have one size"):
        expert_stacks.pack([one, Expert(other.gate, other.down, other.down)], DEVICE, "fp16")
    weight, x, routes = given.packed(), torch.zeros(2, C, device=DEVICE), routed(2)
    with pytest.raises(ShapeError, match=rf"experts: x must be \[T, {C}\]"):
        experts.run_(weight, x[:, 1:], routes, Activation.SILU, x)
    with pytest.raises(ShapeError, match="experts: 2 and 1 rows"):
        experts.run_(weight, x, routes[:1], Activation.SILU, x)
    with pytest.raises(ShapeError, match="route: 5 of 4 experts"):
        experts.route_(torch.zeros(2, 4, device=DEVICE), True, torch.zeros(2, 2, 5, device=DEVICE))
