"""A decoder layer as data: the operations of its equation, in order, over the columns of numbered buffers.

A layer function (families/decoder.py) is recorded into a Program once (families/recorder.py); a backend compiles the
program together with a layer's weights and runs it for any rows. Rows, positions, rotation tables, pages of keys and
values, the weight of an instance and the changes of adapters belong to the call, not to the program.

Letters: T rows, C hidden size, K input features, N output features, Hq and Hkv query and key/value heads, D head size,
I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Linear:
    """out = x W + bias, and the low-rank change of the same name. weight: linears that were packed together."""

    x: View
    weight: str
    out: View


@dataclass(frozen=True, slots=True)
class Rotate:
    """Rotate every head of x in place by the angles of its row."""

    x: View


@dataclass(frozen=True, slots=True)
class Append:
    """Write keys and values of the rows, [T, Hkv, D] each, to the pages of their sequences."""

    k: View
    v: View


@dataclass(frozen=True, slots=True)
class Attend:
    """Causal attention of q: [T, Hq, D] over the keys of its sequence. out: [T, Hq, D]. window: see ModelConfig."""

    q: View
    out: View
    window: int | None


@dataclass(frozen=True, slots=True)
class SiluMul:
    """out = silu(gate) * up. gate_up: [T, 1, 2 * I], gate in the first half of a row; out: [T, 1, I]."""

    gate_up: View
    out: View


@dataclass(frozen=True, slots=True)
class AddResidual:
    """x += w * y, with x the residual stream and w the weight of the layer instance that runs. y: [T, 1, C]."""

    y: View


Operation = RmsNorm | Linear | Rotate | Append | Attend | SiluMul | AddResidual


@dataclass(frozen=True, slots=True)
class Program:
    """The operations of one kind of layer. widths: floats in a row of each buffer; widths[RESIDUAL] is C.

    Each result has a buffer of its own, written whole before it is read; only `Rotate` and `AddResidual` change one.
    """

    widths: tuple[int, ...]
    operations: tuple[Operation, ...]
