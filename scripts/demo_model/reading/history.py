"""What a run's log.jsonl says of the whole run: how far it came, and how long that took."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class History:
    """hours: between each start and the last line before the next. decay_from: None if the rate never fell."""

    steps: int
    tokens: int
    hours: float
    decay_from: float | None
    decay_tokens: float | None


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
    decay = _decay(lines, lines[-1]["tokens"])
    return History(lines[-1]["step"], lines[-1]["tokens"], trained.total_seconds() / 3600, *decay)


def _decay(lines: list[dict[str, Any]], tokens: int) -> tuple[float | None, float | None]:
    """Of the last start, if the run came that far."""
    options = [line["options"] for line in lines if line.get("event") == "start"][-1]
    if options["decay_from"] >= tokens:
        return None, None
    return options["decay_from"], options["decay_tokens"]


def _time(line: dict[str, Any]) -> datetime:
    return datetime.strptime(
        f"2000-{line['time']}", "%Y-%m-%d %H:%M:%S"
    )  # the log leaves the year out; 2000 has all days
