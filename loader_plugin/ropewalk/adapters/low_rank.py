"""Low-rank changes in the layout of a backend: several adapters cost as much as one whose rank is their sum.

    y += (x A^T) B^T       A: [R, K], B: [N, R]      R = sum of the ranks

The adapters of a set are concatenated along the rank; weight and scale of each are multiplied into its B. Linears that
read the same input (q, k, v) are changed together, so that the input is read once. A change reads the input in its
original order, whatever the act-order of the quantised weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ropewalk.adapters.lora import LowRank
from ropewalk.backends.protocol import Backend, LayerChange, LowRankPart, PackedLinear, PackedLowRank
from ropewalk.gptq.linear import DenseLinear

Weighted = tuple[LowRank, float]


UNCHANGED: LayerChange = MappingProxyType({})


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

    linears: the weighted adapters of each linear. widths: N of each.
    """
    first = next((low_rank for weighted in linears for low_rank, _ in weighted), None)
    if first is None:
        return None
    in_features = first.a.shape[1]
    pairs = zip(linears, widths, strict=True)
    return backend.pack_low_rank([_stacked(weighted, in_features, width) for weighted, width in pairs])


def _stacked(weighted: Sequence[Weighted], in_features: int, out_features: int) -> LowRankPart:
    """The adapters of one linear, one after the other along the rank."""
    none = (torch.empty(0, in_features), torch.empty(out_features, 0))
    a = torch.cat([none[0], *(low_rank.a.float() for low_rank, _ in weighted)])  # [r, K]
    scaled = (low_rank.b.float() * (low_rank.scale * weight) for low_rank, weight in weighted)
    return LowRankPart(a, torch.cat([none[1], *scaled], dim=1))


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
    if not change.tables:
        return backend.linear(x, head, change.low_rank)
    logits = backend.linear(x, head).mul_(change.own) if change.own != 0.0 else None  # [T, V]
    for table, weight in change.tables:
        part = backend.linear(x, table).mul_(weight)  # [T, V]
        logits = part if logits is None else logits.add_(part)
    if change.low_rank is not None:
        backend.add_low_rank_(logits, x, change.low_rank)
    return logits
