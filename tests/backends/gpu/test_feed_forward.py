"""What lies between the linears of a feed-forward block: activations, gates, shares of a gate."""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_orders import ORDERS, WIDTH, K, assert_prepared_alike, on_device
from gpu_support import DEVICE, normal
from ropewalk.backends.gpu import feed_forward
from ropewalk.backends.gpu.activations import FeatureOrder
from ropewalk.backends.reference import layers
from ropewalk.base.errors import ShapeError
from ropewalk.families.program import Activation
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around

FORMS = [(activation, gated) for activation in Activation for gated in (True, False)]
every_form = pytest.mark.parametrize("activation, gated", FORMS)


def rows_of(gated: bool, num_rows: int = 5) -> torch.Tensor:
    """From numbers next to 0 to those whose exponentials leave float32."""
    factors = torch.tensor([0.01, 1.0, 10.0, 70.0, 0.0])[:num_rows, None]
    return (normal(num_rows, K * (2 if gated else 1)) * factors).to(DEVICE)


def by_hand(x: torch.Tensor, activation: Activation, gated: bool, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    return layers.activate(x[:, :K], activation) * (x[:, K:] if gated else 1)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of -100, in NumPy: silu is 0 there
@every_form
def test_activations_follow_the_formula(activation: Activation, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, order = rows_of(gated), ORDERS["permuted"]
    for columns in (32, feed_forward.ROW_FLOATS):  # three times over a row, and once
        monkeypatch.setattr(feed_forward, "ROW_FLOATS", columns)
        whole = torch.full((5, K), float("nan"), device=DEVICE)
        made = feed_forward.inner_activations(guarded(x), activation, gated, order, whole)
        exact, plain = (by_hand(x, activation, gated, dtype).cpu() for dtype in (torch.float64, torch.float32))
        assert_as_accurate(whole.cpu(), exact, plain)
        assert_prepared_alike(made, whole, order)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_gates_are_written_as_a_linear_reads_them(order: FeatureOrder) -> None:
    whole = torch.full((5, K), float("nan"), device=DEVICE)
    made = feed_forward.inner_activations(rows_of(True), Activation.SILU, True, order, whole)
    assert_prepared_alike(made, whole, order)


@interpreted_only
def test_the_error_function_of_the_interpreter_is_that_of_torch() -> None:
    """GELU next to the numbers where its two terms cancel."""
    x = torch.linspace(-6, 6, 5 * K).view(5, K).to(DEVICE)
    whole = torch.empty(5, K, device=DEVICE)
    feed_forward.inner_activations(x, Activation.GELU, False, ORDERS["plain"], whole)
    assert torch.allclose(whole, torch.nn.functional.gelu(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_own_row(value: float) -> None:
    gate_up = normal(3, 2 * K).to(DEVICE)
    gate_up[1, K + 4] = value
    made = feed_forward.inner_activations(gate_up, Activation.SILU, True, ORDERS["plain"], None)
    finite = made.values.isfinite()
    assert finite[0].all() and finite[2].all() and not finite[1, 4] and finite[1].sum() == K - 1


def test_each_row_is_written_in_the_order_of_its_expert() -> None:
    own = torch.stack([ORDERS["permuted"].order, ORDERS["permuted"].order.flip(0)])  # [2, WIDTH]
    order, gate_up = FeatureOrder(own, WIDTH, K, torch.float16, scaled=True), rows_of(True, 3)
    experts = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    made = feed_forward.inner_activations(gate_up, Activation.SILU, True, order, None, experts)
    for row, expert in enumerate(experts.tolist()):
        alone = FeatureOrder(own[expert].contiguous(), WIDTH, K, torch.float16, scaled=True)
        expected = feed_forward.inner_activations(gate_up[row : row + 1], Activation.SILU, True, alone, None)
        assert torch.equal(made.values[row], expected.values[0]) and made.scale[row] == expected.scale[0]


@pytest.mark.parametrize("size", [7, 1500])
def test_rows_are_multiplied_by_the_sigmoid_of_their_gate(size: int) -> None:
    x, gate = on_device(normal(3, size), torch.tensor([[0.3], [-200.0], [40.0]]))
    out = guarded(torch.zeros_like(x))
    feed_forward.sigmoid_mul_(guarded(x), guarded(gate), out)
    assert room_around(out).isnan().all()
    exact = (gate.double().sigmoid() * x.double()).cpu()
    assert_as_accurate(out.cpu(), exact, (gate.sigmoid() * x).cpu())


@interpreted_only
def test_every_address_is_one_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = guarded(normal(3, 2 * K))
    with inside_arguments(monkeypatch):
        for order in ORDERS.values():
            feed_forward.inner_activations(gate_up, Activation.GELU_TANH, True, order, torch.empty(3, K))
        feed_forward.sigmoid_mul_(gate_up, guarded(normal(3, 1)), torch.empty(3, 2 * K))


def test_no_rows_are_no_launch() -> None:
    nothing, order = torch.empty(0, K, device=DEVICE), ORDERS["permuted"]
    made = feed_forward.inner_activations(nothing, Activation.GELU, False, order, None)
    assert made.values.shape == (0, WIDTH)
    feed_forward.sigmoid_mul_(nothing, nothing[:, :1], nothing)


def test_what_does_not_fit_is_refused() -> None:
    x, order = torch.zeros(2, K, device=DEVICE), ORDERS["plain"]
    with pytest.raises(ShapeError, match=rf"inner_activations: x must be \[T, {2 * K}\]"):
        feed_forward.inner_activations(x, Activation.SILU, True, order, None)
    with pytest.raises(ShapeError, match="sigmoid_mul: gate must be"):
        feed_forward.sigmoid_mul_(x, x, x)
    with pytest.raises(ShapeError, match="sigmoid_mul: 2 and 1 rows"):
        feed_forward.sigmoid_mul_(x, x[:1, :1], x)
