"""backends/gpu/layers.py: which operations become one launch, and which results exist in float32."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ropewalk.backends.gpu import layers as module
from ropewalk.backends.gpu.activations import Activations, FeatureOrder
from ropewalk.backends.gpu.layers import GpuLayer, RotateAppend, fused
from ropewalk.backends.protocol import RowChange
from ropewalk.families import FAMILIES
from ropewalk.families.program import RESIDUAL, AddResidual, Append, Attend, Linear, Program, RmsNorm, Rotate, View
from ropewalk.families.recorder import LayerShape, record

SHAPE = LayerShape(hidden=64, inner=96, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=False, window=None)
PROGRAM = record(FAMILIES["llama"].kinds["decoder"].layer, SHAPE)
ORDER = FeatureOrder(None, 64, 64, torch.float16, scaled=True)


class Multiplied:
    """Stands for a packed linear; notes the orders that it was given."""

    def __init__(self, *orders: FeatureOrder) -> None:
        self.orders, self.given = orders, []

    def run_(self, inputs: list[Activations], y: torch.Tensor) -> None:
        self.given.append([made.order for made in inputs])
        y.zero_()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The launches of a run, in place of which nothing is computed: (name, what tells one from another)."""
    found: list[tuple[str, Any]] = []

    def made(name: str):
        def produce(x: torch.Tensor, *rest: Any) -> Activations:
            order, whole = rest[-2:]
            found.append((name, whole is not None))
            return Activations(torch.zeros(len(x), order.width), None, order)

        return produce

    def noted(name: str):
        return lambda *given: found.append((name, None))

    def prepare(x: torch.Tensor, order: FeatureOrder) -> Activations:
        found.append(("prepare", order))
        return Activations(x, None, order)

    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "attend", noted("attend"))
    monkeypatch.setattr(module.low_rank, "add_", noted("low rank"))
    for where, name in ((module.rows, "norm_activations"), (module.feed_forward, "inner_activations")):
        monkeypatch.setattr(where, name, made(name))
    for name in ("norm_", "add_residual_"):
        monkeypatch.setattr(module.rows, name, noted(name))
    for name in ("rotate_", "append_", "rotate_append_"):
        monkeypatch.setattr(module.heads, name, noted(name))
    return found


def layer_of(program: Program, **linears: Multiplied) -> tuple[GpuLayer, dict[str, Any]]:
    names = {op.weight for op in program.operations if isinstance(op, (RmsNorm, Linear))}
    weights = {name: linears.get(name, Multiplied(ORDER)) for name in names}
    return GpuLayer(program, weights, 1e-6, "fp16"), weights


def run(layer: GpuLayer, *changes: RowChange) -> None:
    step = SimpleNamespace(x=torch.zeros(3, 64), num_rows=3)
    layer.run_(step, 0, 1.0, changes)


def test_a_layer_is_eleven_launches(launched: list) -> None:
    layer, weights = layer_of(PROGRAM)
    run(layer)
    assert [name for name, _ in launched] == [
        *("norm_activations", "rotate_append_", "attend", "prepare", "add_residual_"),
        *("norm_activations", "inner_activations", "add_residual_"),
    ]
    products = [weights[name] for name in ("qkv", "o", "gate_up", "down")]
    assert all(len(product.given) == 1 for product in products)


def test_what_linears_alone_read_is_not_written_in_float32(launched: list) -> None:
    run(layer_of(PROGRAM)[0])
    assert [whole for name, whole in launched if "activations" in name] == [False, False, False]


def test_a_change_of_a_linear_has_its_input_in_float32(launched: list) -> None:
    change = {"gate_up": object()}
    run(layer_of(PROGRAM)[0], RowChange(0, 2, change))
    assert [whole for name, whole in launched if "activations" in name] == [False, True, False]
    assert [name for name, _ in launched].count("low rank") == 1


def test_a_linear_of_several_orders_is_given_each(launched: list) -> None:
    other = replace(ORDER, order=torch.arange(64, dtype=torch.int32))
    layer, weights = layer_of(PROGRAM, qkv=Multiplied(ORDER, other), o=Multiplied(other, ORDER))
    run(layer)
    assert weights["qkv"].given == [[ORDER, other]] and weights["o"].given == [[other, ORDER]]
    assert [name for name, _ in launched].count("norm_activations") == 3
    assert [order for name, order in launched if name == "prepare"] == [other, ORDER]


def test_a_norm_that_something_else_reads_is_written_as_it_is(launched: list) -> None:
    x, normed, y = View(RESIDUAL, 0, 1, 64), View(1, 0, 1, 64), View(2, 0, 1, 64)
    operations = (RmsNorm(x, "norm", normed), Linear(normed, "up", y), AddResidual(normed), AddResidual(y))
    layer, weights = layer_of(Program((64, 64, 64), operations), norm=Multiplied())
    run(layer)
    assert [name for name, _ in launched] == ["norm_", "prepare", "add_residual_", "add_residual_"]


def test_rotation_and_append_are_one_launch_only_if_nothing_reads_the_keys_afterwards() -> None:
    q, k, v = View(1, 0, 4, 16), View(1, 64, 2, 16), View(1, 96, 2, 16)
    three = (Rotate(q, 0), Rotate(k, 0), Append(k, v))
    after = Attend(q, View(2, 0, 4, 16), None, 0.25)
    assert fused((*three, after)) == (RotateAppend(q, k, v, 0), after)
    for kept in (
        (*three, AddResidual(k)),
        (Rotate(q, 0), Append(k, v)),
        (Rotate(q, 0), Rotate(k, 0), Append(v, v)),
        (Rotate(q, 1), Rotate(k, 0), Append(k, v)),
    ):
        assert fused(kept) == kept


def test_buffers_are_given_back_after_their_last_use(launched: list, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    forget = module._Run.forget_

    def watched(self: Any, index: int) -> None:
        forget(self, index)
        held.append(sum(buffer != RESIDUAL for buffer in self._buffers))

    monkeypatch.setattr(module._Run, "forget_", watched)
    run(layer_of(PROGRAM)[0])
    assert max(held) == 1 and held[-1] == 0
