"""What is computed row by row: norms, rotation, activations and gates, the residual sum, embedding."""

from __future__ import annotations

from ropewalk.native.arrays import Array, as_numpy, checked_shape, new_result
from ropewalk.native.core import _core
from ropewalk.native.runtime import Runtime


def rms_norm(runtime: Runtime, x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight; x: [T, C] or [T, H, C] float32, weight: [C] float32."""
    out = new_result(runtime, x, checked_shape(x, "x", 2, 3))
    _core.rms_norm(runtime.core, as_numpy(x), as_numpy(weight), eps, as_numpy(out))
    return out


def rotate_(runtime: Runtime, x: Array, cos: Array, sin: Array) -> None:
    """Rotate in place the pairs (i, i + R/2) of every head by the angles of its row (Su et al. 2021, eq. 34).

    x: [T, H, D] float32, rows any distance apart. cos, sin: [T, R/2] float32. Dims from R on stay as they are.
    """
    _core.rotate(runtime.core, as_numpy(x), as_numpy(cos), as_numpy(sin))


def layer_norm(runtime: Runtime, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias; x: [T, C] or [T, H, C] float32, both over C.

    weight: [C] or [H, C] float32; bias: the same, or None.
    """
    out = new_result(runtime, x, checked_shape(x, "x", 2, 3))
    shift = None if bias is None else as_numpy(bias)
    _core.layer_norm(runtime.core, as_numpy(x), as_numpy(weight), shift, eps, as_numpy(out))
    return out


def activate(runtime: Runtime, x: Array, activation: str) -> Array:
    """f(x); x: [T, I] float32. activation: "silu", "gelu" (by the error function) or "gelu_tanh". Returns [T, I]."""
    out = new_result(runtime, x, checked_shape(x, "x", 2))
    _core.activate(runtime.core, as_numpy(x), activation, False, as_numpy(out))
    return out


def gate(runtime: Runtime, gate_up: Array, activation: str) -> Array:
    """f(gate) * up; gate_up: [T, 2 * I] float32, gate first. activation: as of `activate`. Returns [T, I]."""
    num_rows, num_columns = checked_shape(gate_up, "gate_up", 2)
    out = new_result(runtime, gate_up, (num_rows, num_columns // 2))
    _core.activate(runtime.core, as_numpy(gate_up), activation, True, as_numpy(out))
    return out


def silu_mul(runtime: Runtime, gate_up: Array) -> Array:
    """silu(gate) * up; gate_up: [T, 2 * I] float32, gate first. Returns [T, I]."""
    return gate(runtime, gate_up, "silu")


def add_(runtime: Runtime, x: Array, y: Array, weight: float = 1.0) -> None:
    """x += weight * y in place; x, y: [T, C] float32."""
    _core.add(runtime.core, as_numpy(x), as_numpy(y), weight)


def embed(runtime: Runtime, table: _core.DenseLinear, token_ids: Array) -> Array:
    """Rows of a table made by `dense_linear`: [V, C] -> [T, C] float32; token_ids: [T] int64."""
    out = new_result(runtime, token_ids, (*checked_shape(token_ids, "token_ids", 1), table.in_features))
    _core.embed(runtime.core, table, as_numpy(token_ids), as_numpy(out))
    return out
