"""Perplexity under several settings: by context length, and by position within one length.

The weights are loaded once. Every variant sees the same tokens, as `evaluate.perplexity` cuts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.generate.evaluate import PerplexityRow, perplexity, read_windows, tokens_used
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.measure.positions import PositionRow, by_position, check_bin
from ropewalk.measure.record import Record
from ropewalk.measure.settings import facts_of
from ropewalk.measure.tables import csv_text
from ropewalk.model.model import Model
from ropewalk.model.token_ids import checked_token_ids
from ropewalk.model.variants import Variant, open_variant


@dataclass(frozen=True, slots=True)
class Curve:
    """The perplexity of a variant at each length; fewer rows than lengths if it was cancelled."""

    name: str
    rope: str
    rows: tuple[PerplexityRow, ...]


@dataclass(frozen=True, slots=True)
class PositionCurve:
    """The perplexity of a variant by position."""

    name: str
    rope: str
    rows: tuple[PositionRow, ...]


def compare_perplexity(
    model: Model,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    variants: Sequence[Variant],
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    record: Record | None = None,
) -> list[Curve]:
    """One curve per variant, in the order given. Arguments and errors as for `evaluate.perplexity`.

    progress: over all variants together. Once cancelled, the curves so far are returned. record: what it holds is not
    measured again, and what is measured is written to it.
    """
    curves: list[Curve] = []
    for number, variant in enumerate(variants):
        if cancelled is not None and cancelled():
            break
        made, adapters = open_variant(model, variant, max(lengths, default=1))
        kept = None if record is None else record.part(variant.name, facts_of(made, variant.adapters))
        report = part_of(progress, number, len(variants))
        rows = perplexity(made, token_ids, lengths, max_tokens, report, cancelled, adapters, kept)
        curves.append(Curve(variant.name, made.rope.describe(), tuple(rows)))
    return curves


def compare_positions(
    model: Model,
    token_ids: Sequence[int],
    length: int,
    bin_size: int,
    variants: Sequence[Variant],
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    record: Record | None = None,
) -> list[PositionCurve]:
    """One curve per variant over the positions of windows of one length, in bins of that many positions.

    Further arguments and errors as for `compare_perplexity`, whose record serves this as well.
    """
    check_bin(bin_size, length)
    ids = checked_token_ids(token_ids, model.config.vocab_size)
    curves: list[PositionCurve] = []
    for number, variant in enumerate(variants):
        made, adapters = open_variant(model, variant, length)
        num_used = tokens_used(len(ids), [length], max_tokens, made.max_seq_len)
        kept = None if record is None else record.part(variant.name, facts_of(made, variant.adapters))
        count = TokenCount(part_of(progress, number, len(variants)), num_used)
        windows = read_windows(made, ids[:num_used], length, count.add, cancelled, adapters, kept)
        if windows is None:
            break
        curves.append(PositionCurve(variant.name, made.rope.describe(), tuple(by_position(windows, bin_size))))
    return curves


def curves_csv(curves: Sequence[Curve]) -> str:
    """One line per variant and length."""
    columns = ("variant", "length", "perplexity", "standard_error", "windows", "scored_tokens", "tokens_per_s")
    rows = [
        (c.name, r.length, f"{r.perplexity:.4f}", number(r.error), r.num_windows, r.num_scored, f"{r.tokens_per_s:.1f}")
        for c in curves
        for r in c.rows
    ]
    return csv_text(columns, rows)


def positions_csv(curves: Sequence[PositionCurve]) -> str:
    """One line per variant and bin."""
    columns = ("variant", "start", "end", "perplexity", "standard_error", "windows", "scored_tokens")
    rows = [
        (c.name, r.start, r.end, f"{r.perplexity:.4f}", number(r.error), r.num_windows, r.num_scored)
        for c in curves
        for r in c.rows
    ]
    return csv_text(columns, rows)


def number(value: float | None) -> str:
    """Four digits after the point; empty if there is none."""
    return "" if value is None else f"{value:.4f}"


def part_of(progress: Progress | None, part: int, count: int) -> Progress | None:
    """Progress of one part of `count` equal ones, reported as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, count * total)


class TokenCount:
    """Adds up numbers of tokens into a progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
