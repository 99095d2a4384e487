"""A decoder layer as data: the operations of its equation, in order, over the columns of numbered buffers.

A layer function (families/decoder.py) is recorded into a Program once (families/recorder.py); a backend compiles the
program together with a layer's weights and runs it for any rows. Rows, positions, rotation tables, pages of keys and
values, the weight of an instance and the changes of adapters belong to the call, not to the program.

Letters: T rows, C hidden size, K input features, N output features, Hq and Hkv query and key/value heads, D head size,
R rotated dims of a head, I intermediate size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activation(Enum):
    """The function of a feed-forward block, by its name in config.json."""

    SILU = "silu"  # x / (1 + exp(-x))
    GELU = "gelu"  # x * (1 + erf(x / sqrt(2))) / 2
    GELU_TANH = "gelu_pytorch_tanh"  # x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2


RESIDUAL = 0  # the buffer of the residual stream x: [T, C], which the caller gives


@dataclass(frozen=True, slots=True)
class View:
    """Columns of a buffer: [T, heads, size] float32, columns first..first + heads * size of its rows.

    Rows are `Program.widths[buffer]` floats apart; heads follow each other without a gap.
    """

    buffer: int
    first: int
    heads: int
    size: int

    @property
    def end(self) -> int:
        """The column after the last."""
        return self.first + self.heads * self.size


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """out = x / sqrt(mean(x^2) + eps) * weight, the mean taken over `size` of each head. weight: a norm's name."""

    x: View
    weight: str
    out: View


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, both taken over `size` of each head (Ba et al. 2016,
    arXiv:1607.06450). weight, bias: norms' names, [size] for all heads or [heads * size]; bias may be None."""

    x: View
    weight: str
    bias: str | None
    out: View


@dataclass(frozen=True, slots=True)
class Linear:
    """out = x W + bias, and the low-rank change of the same name. weight: linears that were packed together."""

    x: View
    weight: str
    out: View


@dataclass(frozen=True, slots=True)
class Rotate:
    """Rotate every head of x in place by the angles of its row. table: which of the step's, where layers differ."""

    x: View
    table: int


@dataclass(frozen=True, slots=True)
class Append:
    """Write keys and values of the rows, [T, Hkv, D] each, to the pages of their sequences."""

    k: View
    v: View


@dataclass(frozen=True, slots=True)
class Attend:
    """Causal attention of q: [T, Hq, D] over the keys of its sequence. out: [T, Hq, D]. window: see ModelConfig.

    scale: what products of queries and keys are multiplied by. softcap: c for c * tanh(product / c), before the mask.
    """

    q: View
    out: View
    window: int | None
    scale: float
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Activate:
    """out = f(x): [T, 1, I] both."""

    x: View
    activation: Activation
    out: View


@dataclass(frozen=True, slots=True)
class Gate:
    """out = f(gate) * up. gate_up: [T, 1, 2 * I], gate in the first half of a row; out: [T, 1, I]."""

    gate_up: View
    activation: Activation
    out: View


@dataclass(frozen=True, slots=True)
class Route:
    """The experts of each row: the `top_k` with the largest share of a softmax over all logits: [T, 1, E].

    out: [T, 2, top_k]: the numbers of the experts, ascending, and their shares, which are divided by their sum where
    `normalised`. Of equal logits the one with the smaller number comes first.
    """

    logits: View
    top_k: int
    normalised: bool
    out: View


@dataclass(frozen=True, slots=True)
class Experts:
    """out = sum over the experts e of a row, in ascending order, of share_e * (f(x Gate_e) * (x Up_e)) Down_e.

    x, out: [T, 1, C]. routes: [T, 2, top_k], as `Route` gives them. weight: the experts that were packed together.
    """

    x: View
    routes: View
    weight: str
    activation: Activation
    out: View


@dataclass(frozen=True, slots=True)
class SigmoidMul:
    """out = sigmoid(gate) * x. x, out: [T, 1, C]; gate: [T, 1, 1]."""

    x: View
    gate: View
    out: View


@dataclass(frozen=True, slots=True)
class AddResidual:
    """x += w * scale * y, with x the residual stream and w the weight of the layer instance that runs. y: [T, 1, C]."""

    y: View
    scale: float = 1.0


Normalise = RmsNorm | LayerNorm
FeedForward = Activate | Gate | Route | Experts | SigmoidMul
Operation = Normalise | Linear | Rotate | Append | Attend | FeedForward | AddResidual


@dataclass(frozen=True, slots=True)
class Program:
    """The operations of one kind of layer. widths: floats in a row of each buffer; widths[RESIDUAL] is C.

    Each result has a buffer of its own, written whole before it is read; only `Rotate` and `AddResidual` change one.
    """

    widths: tuple[int, ...]
    operations: tuple[Operation, ...]
