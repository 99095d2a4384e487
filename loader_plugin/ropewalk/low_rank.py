"""Low-rank changes in the layout of a backend: any number of adapters for the price of one of their summed rank.

    y += ((x A^T) * s) B^T       A: [R, K], s: [R], B: [N, R]      R = sum of the ranks

The adapters of a set are concatenated along the rank; s holds weight * scale of the adapter that a rank belongs to, so
that the matrices stay as stored. Linears that read the same input (q, k, v) share one product with A. Both products run
as dense linears of the backend: float32 activations and accumulation in every compute mode, on inputs in their original
order (act-order is the affair of the quantised weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.protocol import Backend, PackedLinear
from ropewalk.gptq import DenseLinear
from ropewalk.lora import LowRank

Weighted = tuple[LowRank, float]


@dataclass(frozen=True, slots=True, eq=False)
class PackedPart:
    """B of one linear: the ranks that it reads, and the columns of the output that it adds to."""

    ranks: slice
    columns: slice
    b: PackedLinear


@dataclass(frozen=True, slots=True, eq=False)
class PackedLowRank:
    """The change of linears that read the same input. a: K to R; scales: [R] float32."""

    a: PackedLinear
    scales: torch.Tensor
    parts: tuple[PackedPart, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """What a set of adapters changes in one decoder layer."""

    qkv: PackedLowRank | None
    o: PackedLowRank | None
    gate_up: PackedLowRank | None
    down: PackedLowRank | None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingChange:
    """Rows of the table: own * E[id] + sum of weight * table[id] + ((A^T[id]) * s) B^T. a: [V, R]; tables: [V, C]."""

    own: float
    tables: tuple[tuple[torch.Tensor, float], ...]
    a: torch.Tensor | None
    scales: torch.Tensor | None
    b: PackedLinear | None


@dataclass(frozen=True, slots=True, eq=False)
class HeadChange:
    """Logits: own * head(x) + sum of weight * table(x) + the low-rank change."""

    own: float
    tables: tuple[tuple[PackedLinear, float], ...]
    low_rank: PackedLowRank | None


def pack_low_rank(
    backend: Backend, linears: Sequence[Sequence[Weighted]], widths: Sequence[int]
) -> PackedLowRank | None:
    """The changes of linears that read the same input, in the order of their outputs; None if there are none.

    linears: for each the adapters with their weights. widths: N of each.
    """
    matrices, scales, parts = [], [], []
    rank = column = 0
    for weighted, width in zip(linears, widths, strict=True):
        first = rank
        for low_rank, weight in weighted:
            matrices.append(low_rank.a)
            scales += [low_rank.scale * weight] * low_rank.a.shape[0]
            rank += low_rank.a.shape[0]
        if weighted:
            b = torch.cat([low_rank.b for low_rank, _ in weighted], dim=1)  # [N, ranks]
            packed = backend.pack([DenseLinear("lora_B", b, None)])
            parts.append(PackedPart(slice(first, rank), slice(column, column + width), packed))
        column += width
    if not parts:
        return None
    a = backend.pack([DenseLinear("lora_A", torch.cat(matrices), None)])
    return PackedLowRank(a, torch.tensor(scales, dtype=torch.float32, device=backend.device), tuple(parts))


def add_low_rank_(y: torch.Tensor, x: torch.Tensor, backend: Backend, change: PackedLowRank | None) -> None:
    """Add the change to y: [T, N] float32, in place; x: [T, K] float32, the input of the linears."""
    if change is None:
        return
    inner = backend.linear(x, change.a).mul_(change.scales)  # [T, R]
    for part in change.parts:
        ranks = inner if part.ranks == slice(0, inner.shape[1]) else inner[:, part.ranks].contiguous()  # [T, ranks]
        y[:, part.columns].add_(backend.linear(ranks, part.b))


def pack_embedding_change(
    backend: Backend, low_ranks: Sequence[Weighted], tables: Sequence[tuple[torch.Tensor, float]]
) -> EmbeddingChange | None:
    """The change of the embeddings; low_ranks: a [r, V], b [C, r]; tables: [V, C]; None if there is none."""
    if not low_ranks and not tables:
        return None
    device = backend.device
    moved = tuple((table.to(device), weight) for table, weight in tables)
    own = 1.0 - sum(weight for _, weight in tables)
    if not low_ranks:
        return EmbeddingChange(own, moved, None, None, None)
    a = torch.cat([low_rank.a for low_rank, _ in low_ranks]).T.contiguous()  # [V, R]
    b = torch.cat([low_rank.b for low_rank, _ in low_ranks], dim=1)  # [C, R]
    scales = [low_rank.scale * weight for low_rank, weight in low_ranks for _ in range(low_rank.a.shape[0])]
    packed = backend.pack([DenseLinear("lora_embedding_B", b, None)])
    return EmbeddingChange(own, moved, a.to(device), torch.tensor(scales, device=device), packed)


def embed_changed(
    backend: Backend, table: torch.Tensor, token_ids: torch.Tensor, change: EmbeddingChange | None
) -> torch.Tensor:
    """Rows of the changed table. table: [V, C], token_ids: [T] int64 -> [T, C] float32."""
    x = backend.embed(table, token_ids)  # [T, C]
    if change is None:
        return x
    x = x.mul_(change.own) if change.tables else x
    for other, weight in change.tables:
        backend.add_(x, backend.embed(other, token_ids), weight)
    if change.a is not None:
        inner = backend.embed(change.a, token_ids).mul_(change.scales)  # [T, R]
        backend.add_(x, backend.linear(inner, change.b), 1.0)
    return x


def head_changed(backend: Backend, x: torch.Tensor, head: PackedLinear, change: HeadChange | None) -> torch.Tensor:
    """Logits of the changed head. x: [T, C] float32, normalised -> [T, V] float32."""
    if change is None:
        return backend.linear(x, head)
    logits = None if change.tables and change.own == 0.0 else backend.linear(x, head)  # [T, V]
    if change.tables:
        logits = None if logits is None else logits.mul_(change.own)
        for table, weight in change.tables:
            part = backend.linear(x, table).mul_(weight)  # [T, V]
            logits = part if logits is None else logits.add_(part)
    add_low_rank_(logits, x, backend, change.low_rank)
    return logits
