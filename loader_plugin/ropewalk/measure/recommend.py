"""Measure and recommend: which RoPE scaling reads a text of the wanted length best?

The rule, in words (`RULE`), and in steps:
1. The checkpoint's own RoPE, none, and every method by the factor wanted / original length are measured: perplexity of
   windows of the wanted length (`evaluate.perplexity`).
2. The two best methods are measured by 1.5 and 2 times that factor: NTK-aware scaling, above all, reaches less far
   than its factor says.
3. Lowest perplexity wins. Whatever is above it by no more than the standard error of the difference, token by token,
   counts as equal, and of equals the simplest is taken: the checkpoint's own, none, then the smallest factor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.base.estimate import estimate
from ropewalk.generate.evaluate import BlockSums, PerplexityRow, read_windows, row_of, stretches, tokens_used
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.measure.compare import number
from ropewalk.measure.record import Record
from ropewalk.measure.settings import facts_of
from ropewalk.measure.tables import csv_text, with_error
from ropewalk.model.model import Model
from ropewalk.model.token_ids import checked_token_ids
from ropewalk.model.variants import variant_model
from ropewalk.rope.rope import Rope, resolve_rope
from ropewalk.rope.spellings import BY_FACTOR

RULE = (
    "the lowest perplexity at the wanted length; of those within the standard error of the difference, the "
    "checkpoint's own RoPE, then none, then the smallest factor"
)
OWN = "the checkpoint's own"
REFINED = 2  # methods that are measured by further factors
FURTHER = (1.5, 2.0)  # times the factor of the wanted length


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scaling that may be recommended. rope_scaling: as an argument of `load_model`; None: nothing is given."""

    name: str
    rope_scaling: Mapping[str, Any] | None
    rope: Rope
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class MeasuredCandidate:
    """A candidate and its perplexity at the wanted length. behind: its mean -log p minus that of the best, in nats, and
    the standard error of this difference (0 and None for the best)."""

    candidate: Candidate
    row: PerplexityRow
    behind: float
    behind_error: float | None

    @property
    def ties(self) -> bool:
        """True if it cannot be told from the best."""
        return self.behind <= (self.behind_error or 0.0)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What was measured, in that order, and the choice; None if it was cancelled before everything was measured."""

    length: int
    measured: tuple[MeasuredCandidate, ...]
    chosen: MeasuredCandidate | None
    reason: str

    @property
    def options(self) -> str:
        """What to type after `ropewalk chat MODEL` and the like."""
        assert self.chosen is not None
        scaling = self.chosen.candidate.rope_scaling
        given = "" if scaling is None else f" --rope-scaling '{json.dumps(dict(scaling))}'"
        return f"--max-seq-len {self.length}{given}"


def recommend(
    model: Model,
    token_ids: Sequence[int],
    length: int,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    record: Record | None = None,
) -> Recommendation:
    """Measure and choose; see the rule above. The weights are shared, and the model stays as it is.

    length: the context wanted; max_tokens: use at most this many tokens from the start of the text. progress: called
    with (tokens read, tokens to read). record: what it holds is not measured again.

    Raises:
        RequestError: the text is shorter than the length. ConfigError: the length is out of range. CheckpointError: the
            model computes NaN or infinity.
    """
    ids = checked_token_ids(token_ids, model.config.vocab_size)
    num_used = tokens_used(len(ids), [length], max_tokens, length)
    first = candidates(model, length)
    num_further = REFINED * len(FURTHER) if len(first) > 2 else 0
    run = _Run(model, ids[:num_used], length, progress, cancelled, record, (len(first) + num_further) * num_used)
    found = run.measure(first)
    if num_further and len(found) == len(first):
        found += run.measure(_further(model, found))
    if len(found) < len(first) + num_further:
        return Recommendation(length, _compared(found), None, "cancelled before every scaling was measured")
    measured = _compared(found)
    best = min(measured, key=lambda one: one.row.mean_nll)
    chosen = min((one for one in measured if one.ties), key=lambda one: _simplicity(one.candidate))
    return Recommendation(length, measured, chosen, _reason(measured, best, chosen))


def candidates(model: Model, length: int) -> list[Candidate]:
    """What is measured first: within the original length, the checkpoint's own RoPE and none at all."""
    own = resolve_rope(model.config.raw, source=model.config.source)
    found = [Candidate(OWN, None, own)]
    if own.method.name != "none":
        found.append(_candidate(model, "none", 1.0))
    factor = _rounded(length / own.original_length)
    if factor > 1:
        found += [_candidate(model, method, factor) for method in BY_FACTOR]
    return found


def recommendation_csv(found: Recommendation) -> str:
    """One line per scaling that was measured."""
    columns = ("scaling", "factor", "length", "perplexity", "standard_error", "nats_behind", "behind_error", "chosen")
    rows = [
        (
            one.candidate.name,
            f"{one.candidate.factor:g}",
            found.length,
            f"{one.row.perplexity:.4f}",
            number(one.row.error),
            f"{one.behind:.6f}",
            "" if one.behind_error is None else f"{one.behind_error:.6f}",
            "yes" if one is found.chosen else "",
        )
        for one in found.measured
    ]
    return csv_text(columns, rows)


def recommendation_rows(found: Recommendation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table for people; the best first, the choice marked."""
    rows = [
        (
            f"{one.candidate.name} *" if one is found.chosen else one.candidate.name,
            with_error(one.row.perplexity, one.row.error),
            with_error(one.behind, one.behind_error, 4) if one.behind > 0 else "",
        )
        for one in sorted(found.measured, key=lambda one: one.row.mean_nll)
    ]
    return ("scaling", f"perplexity at {found.length:,}", "nats behind"), rows


def _candidate(model: Model, method: str, factor: float) -> Candidate:
    scaling = {"rope_type": "default"} if method == "none" else {"rope_type": method, "factor": factor}
    rope = resolve_rope(model.config.raw, rope_scaling=scaling, source=model.config.source)
    return Candidate(method if method == "none" else f"{method} {factor:g}", scaling, rope, factor)


def _further(model: Model, found: list[tuple[Candidate, list[BlockSums]]]) -> list[Candidate]:
    """The best methods by larger factors."""
    scaled = [(row_of(windows).mean_nll, one) for one, windows in found if one.factor > 1]
    best = sorted(scaled, key=lambda pair: pair[0])[:REFINED]
    return [
        _candidate(model, one.rope_scaling["rope_type"], _rounded(one.factor * further))
        for _, one in best
        for further in FURTHER
    ]


def _rounded(factor: float) -> float:
    """Upwards to hundredths: it must reach."""
    return max(1.0, math.ceil(100 * factor - 1e-6) / 100)


class _Run:
    """Reads the windows of one candidate after the other."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        length: int,
        progress: Progress | None,
        cancelled: Cancelled | None,
        record: Record | None,
        total: int,
    ) -> None:
        self._model, self._ids, self._length, self._record = model, ids, length, record
        self._progress, self._cancelled, self._total, self._done = progress, cancelled, total, 0

    def measure(self, some: Sequence[Candidate]) -> list[tuple[Candidate, list[BlockSums]]]:
        """The windows of each; of those before the first that was cancelled."""
        found: list[tuple[Candidate, list[BlockSums]]] = []
        for one in some:
            made = variant_model(self._model, one.rope, self._length)
            kept = None if self._record is None else self._record.part(one.name, facts_of(made))
            windows = read_windows(made, self._ids, self._length, self._count, self._cancelled, None, kept)
            if windows is None:
                break
            found.append((one, windows))
        return found

    def _count(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)


def _compared(found: Sequence[tuple[Candidate, list[BlockSums]]]) -> tuple[MeasuredCandidate, ...]:
    """Each beside the best, over the same stretches of text."""
    if not found:
        return ()
    _, best = min(found, key=lambda pair: row_of(pair[1]).mean_nll)
    length = best[0].length
    best_sums, counts = stretches(best, 0, length)
    measured = []
    for one, windows in found:
        sums, _ = stretches(windows, 0, length)
        change = estimate([ours - theirs for ours, theirs in zip(sums, best_sums, strict=True)], counts)
        measured.append(MeasuredCandidate(one, row_of(windows), change.mean, change.error))
    return tuple(measured)


def _simplicity(one: Candidate) -> tuple[int, float, int]:
    """The simplest first."""
    if one.rope_scaling is None:
        return 0, 0.0, 0
    method = one.rope_scaling["rope_type"]
    return (1, 0.0, 0) if method == "default" else (2, one.factor, BY_FACTOR.index(method))


def _reason(measured: Sequence[MeasuredCandidate], best: MeasuredCandidate, chosen: MeasuredCandidate) -> str:
    """One sentence."""
    length, own = best.row.length, measured[0]
    said = f"{chosen.candidate.name} has a perplexity of {chosen.row.perplexity:.2f} at {length:,} tokens"
    if chosen is best:
        said += ", the lowest of all that was measured"
    else:
        said += f", within the standard error of the lowest ({best.candidate.name}: {best.row.perplexity:.2f}), and is "
        said += "what the checkpoint declares" if chosen is own else "simpler"
    if chosen is not own:
        said += f"; {OWN} has {own.row.perplexity:.2f}"
    return said + "."
