"""Writes a layer function down: each call notes an operation and answers where its result will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ropewalk.families.program import (
    RESIDUAL,
    Activate,
    Activation,
    AddResidual,
    Append,
    Attend,
    Experts,
    Gate,
    LayerNorm,
    Linear,
    Operation,
    Program,
    RmsNorm,
    Rotate,
    Route,
    SigmoidMul,
    View,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The experts of a layer. normalised: the shares of those that a row takes add up to 1.

    shared_inner: the inner features of an expert that every row takes besides; 0: there is none.
    """

    num_experts: int
    top_k: int
    inner: int
    normalised: bool
    shared_inner: int = 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The sizes of one decoder layer, and what else tells its kind from others of the same family.

    kind: a key of `Family.kinds`. rotation: the table that queries and keys are rotated by; None: they are not.
    attention_scale, attention_cap, residual_scale: see `Scales` (families/family.py); scale None: 1 / sqrt(D).
    """

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    window: int | None
    kind: str = "decoder"
    rotation: int | None = 0
    attention_scale: float | None = None
    attention_cap: float | None = None
    residual_scale: float = 1.0
    activation: Activation = Activation.SILU
    mixture: Mixture | None = None


class Recorder:
    """The operations of a layer as methods. They compute nothing: arguments and results are places in buffers.

    hidden: C, the width of the residual stream. linears: N of all linears that are packed together, by their name.
    """

    def __init__(self, hidden: int, linears: Mapping[str, int]) -> None:
        self._linears = linears
        self._widths = [hidden]
        self._operations: list[Operation] = []
        self.residual = View(RESIDUAL, 0, 1, hidden)  # [T, 1, C]

    @property
    def program(self) -> Program:
        """What has been recorded so far."""
        return Program(tuple(self._widths), tuple(self._operations))

    def rms_norm(self, x: View, weight: str) -> View:
        """x: [T, H, size] -> the same, each head normalised and multiplied by the norm of that name."""
        out = self._new(x.heads, x.size)
        self._operations.append(RmsNorm(x, weight, out))
        return out

    def layer_norm(self, x: View, weight: str, bias: str | None = None) -> View:
        """x: [T, H, size] -> the same, each head centred, normalised, multiplied by one norm and added to another."""
        out = self._new(x.heads, x.size)
        self._operations.append(LayerNorm(x, weight, bias, out))
        return out

    def linear(self, x: View, weight: str) -> View:
        """x: [T, H, size] -> [T, 1, N]; a row of x is the H * size = K input features."""
        out = self._new(1, self._linears[weight])
        self._operations.append(Linear(x, weight, out))
        return out

    def split(self, x: View, *heads: int, size: int) -> tuple[View, ...]:
        """Columns of x as neighbouring groups of so many heads each: [T, heads, size]. Nothing is copied."""
        if sum(heads) * size != x.heads * x.size:
            raise ValueError(f"split: {heads} heads of {size} are not the {x.heads * x.size} columns of {x}")
        firsts = [x.first + size * sum(heads[:index]) for index in range(len(heads))]
        return tuple(View(x.buffer, first, count, size) for first, count in zip(firsts, heads, strict=True))

    def regroup(self, x: View, heads: int) -> View:
        """The same columns as so many heads. Nothing is copied."""
        if x.heads * x.size % heads:
            raise ValueError(f"regroup: {heads} heads do not divide the {x.heads * x.size} columns of {x}")
        return View(x.buffer, x.first, heads, x.heads * x.size // heads)

    def rotate_(self, x: View, table: int = 0) -> None:
        """Rotate x: [T, H, D] in place, by the angles of that table."""
        self._operations.append(Rotate(x, table))

    def append(self, k: View, v: View) -> None:
        """Keep keys and values, [T, Hkv, D] each, for this and later calls."""
        self._operations.append(Append(k, v))

    def attend(self, q: View, window: int | None, scale: float, softcap: float | None = None) -> View:
        """q: [T, Hq, D] -> what its rows see of the kept values, [T, Hq, D]."""
        out = self._new(q.heads, q.size)
        self._operations.append(Attend(q, out, window, scale, softcap))
        return out

    def activate(self, x: View, activation: Activation) -> View:
        """x: [T, 1, I] -> f(x), [T, 1, I]."""
        out = self._new(1, x.size)
        self._operations.append(Activate(x, activation, out))
        return out

    def gate(self, gate_up: View, activation: Activation) -> View:
        """gate_up: [T, 1, 2 * I] -> f(gate) * up, [T, 1, I]."""
        out = self._new(1, gate_up.size // 2)
        self._operations.append(Gate(gate_up, activation, out))
        return out

    def route(self, logits: View, top_k: int, normalised: bool) -> View:
        """logits: [T, 1, E] -> the experts of each row and their shares, [T, 2, top_k]."""
        out = self._new(2, top_k)
        self._operations.append(Route(logits, top_k, normalised, out))
        return out

    def experts(self, x: View, routes: View, weight: str, activation: Activation) -> View:
        """x: [T, 1, C], routes: [T, 2, top_k] -> what the experts of each row make of it, [T, 1, C]."""
        out = self._new(1, x.size)
        self._operations.append(Experts(x, routes, weight, activation, out))
        return out

    def sigmoid_mul(self, x: View, gate: View) -> View:
        """x: [T, 1, C], gate: [T, 1, 1] -> sigmoid(gate) * x, [T, 1, C]."""
        out = self._new(1, x.size)
        self._operations.append(SigmoidMul(x, gate, out))
        return out

    def add_residual_(self, y: View, scale: float = 1.0) -> None:
        """x += w * scale * y: [T, 1, C], with the weight w of the layer instance."""
        self._operations.append(AddResidual(y, scale))

    def _new(self, heads: int, size: int) -> View:
        self._widths.append(heads * size)
        return View(len(self._widths) - 1, 0, heads, size)


LayerFunction = Callable[[Recorder, LayerShape], None]


def record(layer: LayerFunction, shape: LayerShape) -> Program:
    """The program of a layer function for layers of this shape."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    linears = {
        "qkv": heads * shape.head_dim,
        "o": shape.hidden,
        "gate_up": 2 * shape.inner,
        "up": shape.inner,
        "down": shape.hidden,
    }
    if shape.mixture is not None:
        linears |= {
            "router": shape.mixture.num_experts,
            "shared_gate_up": 2 * shape.mixture.shared_inner,
            "shared_down": shape.hidden,
            "shared_gate": 1,
        }
    recorder = Recorder(shape.hidden, linears)
    layer(recorder, shape)
    return recorder.program
