"""Perplexity by context length under several RoPE scalings and adapters, as one table.

The weights are loaded once. Every variant sees the same tokens, as `evaluate.perplexity` cuts them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.generate.evaluate import PerplexityRow, perplexity
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.model.model import Model
from ropewalk.model.variants import Variant, open_variant


@dataclass(frozen=True, slots=True)
class Curve:
    """The perplexity of a variant at each length; fewer rows than lengths if it was cancelled."""

    name: str
    rope: str
    rows: tuple[PerplexityRow, ...]


def compare_perplexity(
    model: Model,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    variants: Sequence[Variant],
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> list[Curve]:
    """One curve per variant, in the order given. Arguments and errors as for `evaluate.perplexity`.

    progress: over all variants together. Once cancelled, the curves so far are returned.
    """
    curves: list[Curve] = []
    for number, variant in enumerate(variants):
        if cancelled is not None and cancelled():
            break
        made, adapters = open_variant(model, variant, max(lengths, default=1))
        rows = perplexity(
            made, token_ids, lengths, max_tokens, _part(progress, number, len(variants)), cancelled, adapters
        )
        curves.append(Curve(variant.name, made.rope.describe(), tuple(rows)))
    return curves


def curves_csv(curves: Sequence[Curve]) -> str:
    """One line per variant and length."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "length", "perplexity", "windows", "scored_tokens", "tokens_per_s"])
    for curve in curves:
        for row in curve.rows:
            numbers = [f"{row.perplexity:.4f}", row.num_windows, row.num_scored, f"{row.tokens_per_s:.1f}"]
            writer.writerow([curve.name, row.length, *numbers])
    return out.getvalue()


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one part of `count` equal ones, reported as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)
