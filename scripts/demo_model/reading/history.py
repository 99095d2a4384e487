"""What a run's log.jsonl says of the whole run: how far it came, and how long that took."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Fall:
    """A stretch of tokens over which the rate fell, from `share` of the full one to `left` of it: nothing, unless
    another schedule took over before its end."""

    start: float
    end: float
    share: float
    left: float = 0.0


@dataclass(frozen=True, slots=True)
class History:
    """hours: between each start and the last line before the next."""

    steps: int
    tokens: int
    hours: float
    falls: tuple[Fall, ...]


def read_history(path: Path) -> History:
    """The history of a run.

    Raises:
        SystemExit: there is no log.
    """
    if not path.is_file():
        raise SystemExit(f"{path} is missing: the run that it belongs to has not begun")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    trained, started, last = timedelta(), None, None
    for line in lines:
        if line.get("event") == "start":
            trained += (last - started) if started is not None else timedelta()
            started = _time(line)
        last = _time(line)
    trained += last - started
    return History(lines[-1]["step"], lines[-1]["tokens"], trained.total_seconds() / 3600, tuple(_falls(lines)))


def _falls(lines: list[dict[str, Any]]) -> Iterable[Fall]:
    """Of each pair of options that the run was started with and came to."""
    begun: dict[tuple[float, float], Fall] = {}
    first, over, before = math.inf, 0.0, 0
    for line in lines:
        if line.get("event") == "start":
            options = line["options"]["decay_from"], line["options"]["decay_tokens"]
            fall = begun.get((first, over))
            if options != (first, over) and fall is not None and before < fall.end:
                begun[first, over] = replace(fall, end=before, left=1 - (before - first) / over)
            first, over = options
        elif line["tokens"] > first and (first, over) not in begun:
            start = max(first, before)
            begun[first, over] = Fall(start, first + over, 1 - (start - first) / over)
        before = line["tokens"]
    return begun.values()


def _time(line: dict[str, Any]) -> datetime:
    return datetime.strptime(
        f"2000-{line['time']}", "%Y-%m-%d %H:%M:%S"
    )  # the log leaves the year out; 2000 has all days
