"""What came of a simulation, or of the same workload on real replicas, in numbers that can be compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from simulation import Simulation


@dataclass(frozen=True, slots=True)
class Result:
    """seconds: from the first request to the last token. tokens_s: of replies. cached: part of all prompts that was
    found in a cache. first_s: median, 95th and 99th percentile of the time to the first token, and later_s those of
    turns that are not the first of their conversation."""

    seconds: float
    tokens_s: float
    cached: float
    first_s: tuple[float, float, float]
    later_s: tuple[float, float, float]


def result_of(simulation: Simulation) -> Result:
    """Of the turns that are over."""
    turns = [turn for turn in simulation.turns if turn.ended_s is not None]
    if not turns:
        raise ValueError("no turn is over: run it for longer")
    seconds = max(turn.ended_s or 0.0 for turn in turns)
    waits = [(turn.first_s or 0.0) - turn.asked_s for turn in turns]
    seen: set[int] = set()
    later = []
    for turn, wait in zip(turns, waits, strict=True):
        if turn.conversation.number in seen:
            later.append(wait)
        seen.add(turn.conversation.number)
    return Result(
        seconds,
        sum(turn.reply_tokens for turn in turns) / seconds,
        sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns),
        percentiles(waits),
        percentiles(later or waits),
    )


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95th and 99th percentile."""
    if len(values) < 2:
        return (values[0],) * 3
    parts = statistics.quantiles(values, n=100, method="inclusive")
    return parts[49], parts[94], parts[98]
